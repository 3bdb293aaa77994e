"""The mutants that no test can kill, and why."""

_NEGATIVE = "NumPy takes any negative length for -1"
_EQUAL_ROWS = "the array has one row, or all its rows are equal"

# By module: the line, what it became, why nothing can tell.
SURVIVORS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "reference/clipping.py": (
        (
            "scale = threshold / norm if recorded and norm > threshold else np.float32(1.0)",
            "scale = threshold / norm if recorded and norm >= threshold else np.float32(1.0)",
            "where they are equal, the quotient is 1",
        ),
        (
            "g = _fill_up(grad.astype(np.float32).reshape(-1), CHUNK)",
            "g = _fill_up(grad.astype(np.float32).reshape(- 2), CHUNK)",
            _NEGATIVE,
        ),
        (
            "squares = (g * g).reshape(-1, CHUNK // CHUNK_LANES, CHUNK_LANES)",
            "squares = (g * g).reshape(- 2, CHUNK // CHUNK_LANES, CHUNK_LANES)",
            _NEGATIVE,
        ),
        ("for row in partials.reshape(-1, TOTAL_LANES):", "for row in partials.reshape(- 2, TOTAL_LANES):", _NEGATIVE),
        (
            "totals = np.zeros((1, TOTAL_LANES), np.float64)",
            "totals = np.zeros(( 2, TOTAL_LANES), np.float64)",
            _EQUAL_ROWS,
        ),
        ("return np.float32(_add_pairs(totals)[0])", "return np.float32(_add_pairs(totals)[ -1])", _EQUAL_ROWS),
        ("return lanes[:, 0]", "return lanes[:, -1]", _EQUAL_ROWS),
    ),
}
