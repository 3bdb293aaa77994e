"""Questions of newcomers, each with the place that answers it, at most two clicks from the home page.

A click is a link in the text of a page or in its list of contents, not one in the sidebar, which has every page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(os.environ.get("LION_DOCS_HTML", ""))
pytestmark = pytest.mark.skipif(not os.environ.get("LION_DOCS_HTML"), reason="LION_DOCS_HTML names no built site")

QUESTIONS = {
    "How much memory do I save with a 3B model in bfloat16?": (
        "save-memory.html#how-much-for-a-3b-model-in-bfloat16",
        ("12 GB", "3.05 GB"),
    ),
    "Which driver do I need?": ("install.html#which-extra", ("580", "525", "cu13")),
    "Which learning rate and weight decay, coming from AdamW?": (
        "migrating/adamw.html#learning-rate-and-weight-decay",
        ("3 to 10 times smaller", "larger by the same factor"),
    ),
    "How do I use it with the Trainer?": ("trainers.html#hugging-face", ("optimizer_cls_and_kwargs",)),
    "How do I resume from bitsandbytes?": ("migrating/bitsandbytes.html#resume-a-run", ("load_state_dict",)),
    "Why is my loss worse?": ("troubleshooting.html#worse-loss-than-adamw", ("Learning rate", "Betas")),
    "What can I do when memory runs out?": ("troubleshooting.html#out-of-memory", ("Lion8bit", "StepInBackward")),
    "Does it work with LoRA over a 4-bit base?": (
        "troubleshooting.html#adapters-and-quantized-bases",
        ("LoRA", "bitsandbytes"),
    ),
    "Does it work with FSDP?": ("distributed.html#fsdp2", ("fully_shard",)),
    "Why does the first step take so long?": ("troubleshooting.html#slow-first-step", ("NUMBA_CACHE_DIR",)),
    "Does it run on Windows, macOS or AMD?": ("install.html#what-runs-where", ("Windows", "macOS", "ROCm")),
    "Which class do I take?": ("choosing.html", ("Lion8bit", "PagedLion8bit")),
}


def links(path: Path) -> set[str]:
    """Return where the links of a page's text and of its list of contents lead, from the root of the site."""
    text = path.read_text(encoding="utf-8")
    parts = re.findall(r"<article.*?</article>|<aside class=\"toc-drawer.*?</aside>", text, re.DOTALL)
    found = set()
    for href in re.findall(r'href="([^"]+)"', "".join(parts)):
        target = urlsplit(href)
        if not target.scheme:
            page = (path.parent / unquote(target.path)).resolve() if target.path else path
            if page.suffix == ".html" and page.is_file():
                found.add(f"{page.relative_to(SITE.resolve())}" + (f"#{target.fragment}" if target.fragment else ""))
    return found


def clicks() -> dict[str, int]:
    """Return how many clicks from the home page each place is that two clicks reach."""
    distance = {"index.html": 0}
    for count in (1, 2):
        for place in [place for place, known in distance.items() if known == count - 1]:
            for link in links(SITE.resolve() / place.partition("#")[0]):
                distance.setdefault(link, count)
    return distance


def section(place: str) -> str:
    """Return the text of a page from an anchor to the end of its section, without tags."""
    name, _, anchor = place.partition("#")
    text = (SITE / name).read_text(encoding="utf-8")
    begin = text.index(f'<section id="{anchor}"' if anchor else "<article")
    depth, end = 0, begin
    for tag in re.finditer(r"</?section\b", text[begin:]):
        depth += 1 if tag[0] == "<section" else -1
        end = begin + tag.end()
        if depth == 0:
            break
    return re.sub(r"<[^>]+>", "", text[begin:end])


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_is_answered_within_two_clicks(question: str) -> None:
    place, words = QUESTIONS[question]
    assert clicks().get(place, 3) <= 2
    answer = section(place)
    assert all(word in answer for word in words), answer


def test_a_missing_place_would_be_noticed() -> None:
    assert "troubleshooting.html#no-such-symptom" not in clicks()
    assert "fully_shard" not in section("distributed.html#ddp")
