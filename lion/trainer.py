"""For Hugging Face's Trainer: what it needs to make one of these optimizers itself."""

from __future__ import annotations

from typing import Any

from lion.optimizers import Lion

_ADAM_BETAS = (0.9, 0.999)


def optimizer_cls_and_kwargs(args: Any, cls: type[Lion] = Lion, **kwargs: Any) -> tuple[type[Lion], dict[str, Any]]:
    """Return the argument of this name of ``transformers.Trainer``.

    The Trainer then makes the optimizer, with weight decay on the parameters that it decays with any other optimizer.
    ``learning_rate`` and ``weight_decay`` are those of ``args``, and so are the betas (``adam_beta1``,
    ``adam_beta2``), unless they are the defaults of ``TrainingArguments``: those are Adam's, and Lion's
    (0.9, 0.99) are used instead. ``adam_epsilon`` has no counterpart in Lion.

    Args:
        args: The ``TrainingArguments``.
        cls: The class of the optimizer (default: :class:`lion.Lion`).
        **kwargs: More arguments of the class; they go before what ``args`` say.

    Returns:
        The class and its keyword arguments.

    Raises:
        TypeError: If ``cls`` is none of this package.
        ValueError: If ``args.optim_args`` is set; its options are to be given as ``kwargs``.
    """
    if not (isinstance(cls, type) and issubclass(cls, Lion)):
        raise TypeError(f"Invalid cls: {cls!r}; expected a class of this package")
    if getattr(args, "optim_args", None):
        raise ValueError(f"Invalid optim_args: {args.optim_args!r}; give these options as keyword arguments here")
    chosen = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != _ADAM_BETAS:
        chosen["betas"] = betas
    return cls, {**chosen, **kwargs}
