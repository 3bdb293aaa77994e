"""The mutants that no test can kill, and why."""

_NEGATIVE = "NumPy takes any negative length for -1"
_EQUAL_ROWS = "the array has one row, or all its rows are equal"
_EQUAL_NORMS = "where they are equal, the quotient is 1"
_ROOM = "there is more room than needed"
_NOTHING = "once more round the loop, over no element"
_ALONE = "the caller works alone up to pool.SMALL elements"
_NOT_NORMAL = "what is below the normal numbers is stored as 0"
_LARGE_CHUNKS = "larger chunks of work, fewer threads get one: speed only"
_UNUSED = "the value goes nowhere"

# By module: the line, what it became, why nothing can tell.
SURVIVORS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "reference/clipping.py": (
        (
            "scale = threshold / norm if recorded and norm > threshold else np.float32(1.0)",
            "scale = threshold / norm if recorded and norm >= threshold else np.float32(1.0)",
            _EQUAL_NORMS,
        ),
        (
            "g = _fill_up((grad.astype(np.float32) * inv_scale).reshape(-1), CHUNK)",
            "g = _fill_up((grad.astype(np.float32) * inv_scale).reshape(- 2), CHUNK)",
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
    "reference/quantization.py": (("flat = array.reshape(-1)", "flat = array.reshape(- 2)", _NEGATIVE),),
    "cpu_kernels/clipping.py": (
        (
            "partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 1).sum()), np.float32)",
            "partials = np.empty(int(np.maximum(-(-sizes * CHUNK), 1).sum()), np.float32)",
            _ROOM,
        ),
        (
            "partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 1).sum()), np.float32)",
            "partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 2).sum()), np.float32)",
            _ROOM,
        ),
        ("while begin < end:", "while begin <= end:", _NOTHING),
        ("while count > 1:", "while count >= 1:", _NOTHING),
        ("while count > 1:", "while count > 0:", _NOTHING),
        ("if norm > threshold:", "if norm >= threshold:", _EQUAL_NORMS),
        (
            "run(_totals_kernel(), threads, 0, sizes, partials, norms)",
            "run(_totals_kernel(), threads, 1, sizes, partials, norms)",
            _ALONE,
        ),
        (
            "run(_totals_kernel(), threads, 0, sizes, partials, norms)",
            "run(_totals_kernel(), threads, -1, sizes, partials, norms)",
            _ALONE,
        ),
        (
            "run(_clip_kernel(), threads, 0, squared_norms, gnorm_vecs, steps, scales, percentile)",
            "run(_clip_kernel(), threads, 1, squared_norms, gnorm_vecs, steps, scales, percentile)",
            _ALONE,
        ),
        (
            "run(_clip_kernel(), threads, 0, squared_norms, gnorm_vecs, steps, scales, percentile)",
            "run(_clip_kernel(), threads, -1, squared_norms, gnorm_vecs, steps, scales, percentile)",
            _ALONE,
        ),
    ),
    "cpu_kernels/lion.py": (
        ("run(reset, threads, 0, new_absmax)", "run(reset, threads, -1, new_absmax)", _ALONE),
        (
            "run(finish, threads, 0, absmax, new_absmax, sizes)",
            "run(finish, threads, 1, absmax, new_absmax, sizes)",
            _ALONE,
        ),
        (
            "run(finish, threads, 0, absmax, new_absmax, sizes)",
            "run(finish, threads, -1, absmax, new_absmax, sizes)",
            _ALONE,
        ),
        ("maximum = np.uint32(0)", "maximum = np.uint32( 1)", _NOT_NORMAL),
    ),
    "cpu_kernels/quantization.py": (
        (
            "return block_size * max(1, CHUNK // block_size)",
            "return block_size * max(1, CHUNK * block_size)",
            _LARGE_CHUNKS,
        ),
        (
            "return block_size * max(1, CHUNK // block_size)",
            "return block_size * max( 2, CHUNK // block_size)",
            _LARGE_CHUNKS,
        ),
        (
            "order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)",
            "order = (bits ^ ((bits >> 32) & 0x7FFFFFFF)).astype(np.int64)",
            "NumPy fills with the sign, however far it shifts",
        ),
        (
            "tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)",
            "tensor, first, begin, end = pull(control, sizes, chunk_size, -1, 0)",
            "the only tensor is done twice, with the same result",
        ),
        ("maximum = np.uint32(0)", "maximum = np.uint32( 1)", _NOT_NORMAL),
        ("starts = np.arange(-8192, 8192) << 17", "starts = np.arange(-8192, 8193) << 17", _UNUSED),
        ("starts = np.arange(-8192, 8192) << 17", "starts = np.arange(-8192, 8191) << 17", _UNUSED),
        ("assert (last - code <= 1).all()", "assert (last - code <= 2).all()", "it holds"),
        (
            "next_threshold = np.append(order, 0)[code]",
            "next_threshold = np.append(order, 1)[code]",
            _UNUSED,
        ),
        (
            "next_threshold = np.append(order, 0)[code]",
            "next_threshold = np.append(order, -1)[code]",
            _UNUSED,
        ),
        (
            "carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 0)",
            "carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 1)",
            "all else is a multiple of 128: nothing carries",
        ),
        (
            "order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))",
            "order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32( 32)) & np.int32(0x7FFFFFFF)))",
            "Numba shifts in 64 bits",
        ),
    ),
}
