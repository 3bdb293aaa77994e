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
_OTHER_FUNCTION = "another linear function is found, or the same one: it is checked for every entry"
_CHECKED_LESS = "what holds is checked for less at import"

# By module: a line, why nothing can tell, what it became.
SURVIVORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "reference/clipping.py": (
        (
            "scale = threshold / norm if recorded and norm > threshold else np.float32(1.0)",
            _EQUAL_NORMS,
            "scale = threshold / norm if recorded and norm >= threshold else np.float32(1.0)",
        ),
        (
            "g = _fill_up((grad.astype(np.float32) * inv_scale).reshape(-1), CHUNK)",
            _NEGATIVE,
            "g = _fill_up((grad.astype(np.float32) * inv_scale).reshape(- 2), CHUNK)",
        ),
        (
            "squares = (g * g).reshape(-1, CHUNK // CHUNK_LANES, CHUNK_LANES)",
            _NEGATIVE,
            "squares = (g * g).reshape(- 2, CHUNK // CHUNK_LANES, CHUNK_LANES)",
        ),
        (
            "for row in partials.reshape(-1, TOTAL_LANES):",
            _NEGATIVE,
            "for row in partials.reshape(- 2, TOTAL_LANES):",
        ),
        (
            "totals = np.zeros((1, TOTAL_LANES), np.float64)",
            _EQUAL_ROWS,
            "totals = np.zeros(( 2, TOTAL_LANES), np.float64)",
        ),
        (
            "return np.float32(_add_pairs(totals)[0])",
            _EQUAL_ROWS,
            "return np.float32(_add_pairs(totals)[ -1])",
        ),
        (
            "return lanes[:, 0]",
            _EQUAL_ROWS,
            "return lanes[:, -1]",
        ),
    ),
    "reference/quantization.py": (
        (
            "flat = array.reshape(-1)",
            _NEGATIVE,
            "flat = array.reshape(- 2)",
        ),
    ),
    "cpu_kernels/clipping.py": (
        (
            "partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 1).sum()), np.float32)",
            _ROOM,
            "partials = np.empty(int(np.maximum(-(-sizes * CHUNK), 1).sum()), np.float32)",
            "partials = np.empty(int(np.maximum(-(-sizes // CHUNK), 2).sum()), np.float32)",
        ),
        (
            "while begin < end:",
            _NOTHING,
            "while begin <= end:",
        ),
        (
            "while count > 1:",
            _NOTHING,
            "while count >= 1:",
            "while count > 0:",
        ),
        (
            "if norm > threshold:",
            _EQUAL_NORMS,
            "if norm >= threshold:",
        ),
        (
            "run(_totals_kernel(), threads, 0, sizes, partials, norms)",
            _ALONE,
            "run(_totals_kernel(), threads, 1, sizes, partials, norms)",
            "run(_totals_kernel(), threads, -1, sizes, partials, norms)",
        ),
        (
            "run(_clip_kernel(), threads, 0, squared_norms, gnorm_vecs, steps, scales, percentile)",
            _ALONE,
            "run(_clip_kernel(), threads, 1, squared_norms, gnorm_vecs, steps, scales, percentile)",
            "run(_clip_kernel(), threads, -1, squared_norms, gnorm_vecs, steps, scales, percentile)",
        ),
    ),
    "cpu_kernels/lion.py": (
        (
            "run(reset, threads, 0, new_absmax)",
            _ALONE,
            "run(reset, threads, -1, new_absmax)",
        ),
        (
            "run(finish, threads, 0, absmax, new_absmax, sizes)",
            _ALONE,
            "run(finish, threads, 1, absmax, new_absmax, sizes)",
            "run(finish, threads, -1, absmax, new_absmax, sizes)",
        ),
        (
            "maximum = np.uint32(0)",
            _NOT_NORMAL,
            "maximum = np.uint32( 1)",
        ),
    ),
    "cpu_kernels/quantization.py": (
        (
            "sure = True",
            "all blocks are quantized a second time: speed only",
            "sure = False",
        ),
        (
            "return block_size * max(1, CHUNK // block_size)",
            _LARGE_CHUNKS,
            "return block_size * max(1, CHUNK * block_size)",
            "return block_size * max( 2, CHUNK // block_size)",
        ),
        (
            "tensor, first, begin, end = pull(control, sizes, chunk_size, 0, 0)",
            "the only tensor is done twice, with the same result",
            "tensor, first, begin, end = pull(control, sizes, chunk_size, -1, 0)",
        ),
        (
            "maximum = np.uint32(0)",
            _NOT_NORMAL,
            "maximum = np.uint32( 1)",
        ),
    ),
    "cpu_kernels/portable.py": (
        (
            "order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)",
            "NumPy fills with the sign, however far it shifts",
            "order = (bits ^ ((bits >> 32) & 0x7FFFFFFF)).astype(np.int64)",
        ),
        (
            "starts = np.arange(-8192, 8192) << 17",
            _UNUSED,
            "starts = np.arange(-8192, 8193) << 17",
            "starts = np.arange(-8192, 8191) << 17",
        ),
        (
            "assert (last - code <= 1).all()",
            "it holds",
            "assert (last - code <= 2).all()",
        ),
        (
            "next_threshold = np.append(order, 0)[code]",
            _UNUSED,
            "next_threshold = np.append(order, 1)[code]",
            "next_threshold = np.append(order, -1)[code]",
        ),
        (
            "carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 0)",
            "all else is a multiple of 128: nothing carries",
            "carry = np.where(last > code, (1 << 24) - ((next_threshold + 1 - starts) << 7), 1)",
        ),
        (
            "order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))",
            "Numba shifts in 64 bits",
            "order = np.int32(bits ^ np.int32(np.int32(bits >> np.int32( 32)) & np.int32(0x7FFFFFFF)))",
        ),
    ),
    "cpu_kernels/rounding.py": (
        (
            "LOW = 0",
            "the only column",
            "LOW = -1",
        ),
        (
            "SPAN = 256",
            "speed only; the room for whole groups is the same",
            "SPAN = 257",
        ),
        (
            "_NO_ROWS = np.empty((0, 0), np.int64)",
            "rows that nobody reads",
            "_NO_ROWS = np.empty(( 1, 0), np.int64)",
            "_NO_ROWS = np.empty((0, 1), np.int64)",
        ),
        (
            "return weights.lows.reshape(-1, 1)",
            _NEGATIVE,
            "return weights.lows.reshape(- 2, 1)",
        ),
        (
            "rows = np.empty((steps.size, 4), np.int64)",
            _ROOM,
            "rows = np.empty((steps.size, 5), np.int64)",
        ),
        (
            "run(_number_kernel(), 1, 0, steps, rows)",
            _ALONE,
            "run(_number_kernel(), 2, 0, steps, rows)",
            "run(_number_kernel(), 1, 1, steps, rows)",
            "run(_number_kernel(), 1, -1, steps, rows)",
        ),
        (
            "return 0",
            "an address that nobody reads",
            "return 1",
            "return -1",
        ),
        (
            "groups = (element + (end - begin) + 7) // 8 - element // 8",
            "at most one group more, for which there is room",
            "groups = (element + (end - begin) + 8) // 8 - element // 8",
        ),
    ),
    "cpu_kernels/pool.py": (
        (
            "SMALL = 1 << 20",
            "where a caller begins to wake threads: speed only",
            "SMALL = 1 >> 20",
            "SMALL = 2 << 20",
            "SMALL = 0 << 20",
            "SMALL = 1 << 21",
            "SMALL = 1 << 19",
        ),
        (
            "if threads == 1 or sizes is None or sizes.sum() <= SMALL:",
            "where a caller begins to wake threads: speed only",
            "if threads == 1 or sizes is None or sizes.sum() < SMALL:",
            "if threads == 1 or sizes is None or sizes.sum() > SMALL:",
        ),
        (
            "NEXT, ACTIVE, CONTROL_SIZE = 8, 16, 24",
            "another place in the control block, which has room",
            "NEXT, ACTIVE, CONTROL_SIZE = 9, 16, 24",
            "NEXT, ACTIVE, CONTROL_SIZE = 7, 16, 24",
            "NEXT, ACTIVE, CONTROL_SIZE = 8, 17, 24",
            "NEXT, ACTIVE, CONTROL_SIZE = 8, 15, 24",
            "NEXT, ACTIVE, CONTROL_SIZE = 8, 16, 25",
            "NEXT, ACTIVE, CONTROL_SIZE = 8, 16, 23",
        ),
        (
            "CLOSED = 1 << 62",
            "no job has as many chunks",
            "CLOSED = 1 << 61",
        ),
        (
            "if threads == 1 or sizes is None or sizes.sum() <= SMALL:",
            "there are never 0 threads here",
            "if threads == 0 or sizes is None or sizes.sum() <= SMALL:",
        ),
        (
            "return tensor, first, 0, 0",
            _UNUSED,
            "return tensor, first, 1, 0",
            "return tensor, first, -1, 0",
            "return tensor, first, 0, 1",
            "return tensor, first, 0, -1",
        ),
    ),
    "cpu_kernels/device.py": (
        (
            "TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[::1], types.float32[::1], types.int64, types.float32",
            "any layout has the same results: speed only",
            "TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[:: 2], types.float32[::1], types.int64, types.float32",
            "TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[:: 0], types.float32[::1], types.int64, types.float32",
            "TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[::1], types.float32[:: 2], types.int64, types.float32",
            "TABLE, FLOATS, INTEGER, FLOAT32 = types.int64[::1], types.float32[:: 0], types.int64, types.float32",
        ),
        (
            "DEFAULT_FLOAT_MODE = 0x1F80 if X86 else 0",
            "a flag that an operation sets, and nobody reads",
            "DEFAULT_FLOAT_MODE = 8065 if X86 else 0",
        ),
        (
            "DEFAULT_FLOAT_MODE = 0x1F80 if X86 else 0",
            "for other processors",
            "DEFAULT_FLOAT_MODE = 0x1F80 if X86 else 1",
            "DEFAULT_FLOAT_MODE = 0x1F80 if X86 else -1",
        ),
        (
            'builder.call(cgutils.get_or_insert_function(builder.module, put, "llvm.aarch64.set.fpcr"), [args[0]])',
            "for other processors",
            'builder.call(cgutils.get_or_insert_function(builder.module, put, "llvm.aarch64.set.fpcr"), [args[ 1]])',
            'builder.call(cgutils.get_or_insert_function(builder.module, put, "llvm.aarch64.set.fpcr"), [args[ -1]])',
        ),
        (
            "return I64(0)",
            "for other processors",
            "return I64( 1)",
            "return I64( -1)",
        ),
        (
            "return digest.hexdigest()[:16]",
            "as good a name",
            "return digest.hexdigest()[: 17]",
            "return digest.hexdigest()[: 15]",
        ),
        (
            "return builder.trunc(builder.select(nan, I32(0x7FC0), rounded), I16)",
            "another NaN",
            "return builder.trunc(builder.select(nan, I32( 32705), rounded), I16)",
            "return builder.trunc(builder.select(nan, I32( 32703), rounded), I16)",
        ),
        (
            "return builder.bitcast(args[0], I32)",
            "there is one argument",
            "return builder.bitcast(args[ -1], I32)",
        ),
        (
            "return builder.bitcast(args[0], FLOAT)",
            "there is one argument",
            "return builder.bitcast(args[ -1], FLOAT)",
        ),
        (
            "builder.store(builder.trunc(args[0], I32), slot)",
            "there is one argument",
            "builder.store(builder.trunc(args[ -1], I32), slot)",
        ),
        (
            'inlined = numba.njit(nogil=True, error_model="numpy")',
            "the kernel around it has given the GIL away",
            'inlined = numba.njit(nogil=False, error_model="numpy")',
        ),
        (
            "value = builder.load(_pointer(builder, args[1], args[2], item), align=1)",
            "x86 loads and stores at any address",
            "value = builder.load(_pointer(builder, args[1], args[2], item), align= 2)",
        ),
        (
            "builder.store(value, _pointer(builder, args[1], args[2], item), align=1)",
            "x86 loads and stores at any address",
            "builder.store(value, _pointer(builder, args[1], args[2], item), align= 2)",
        ),
    ),
    "cpu_kernels/avx2.py": (
        (
            "_SIGN, _MAGNITUDE, _SIGN_AND_EXPONENT = -(1 << 31), 0x7FFFFFFF, -(1 << 23)",
            "the same 32 bits; or a few values in the middle of wide intervals are no longer sure: speed only",
            "_SIGN, _MAGNITUDE, _SIGN_AND_EXPONENT = (1 << 31), 0x7FFFFFFF, -(1 << 23)",
            "_SIGN, _MAGNITUDE, _SIGN_AND_EXPONENT = -(1 << 30), 0x7FFFFFFF, -(1 << 23)",
        ),
        (
            "for a in (first.view(np.int32) + np.arange(0, -4, -1, dtype=np.int32)).view(np.float32):",
            _OTHER_FUNCTION,
            "for a in (first.view(np.int32) + np.arange( 1, -4, -1, dtype=np.int32)).view(np.float32):",
            "for a in (first.view(np.int32) + np.arange( -1, -4, -1, dtype=np.int32)).view(np.float32):",
            "for a in (first.view(np.int32) + np.arange(0, - 5, -1, dtype=np.int32)).view(np.float32):",
            "for a in (first.view(np.int32) + np.arange(0, - 3, -1, dtype=np.int32)).view(np.float32):",
        ),
        (
            "for b in (step.view(np.int32) + np.arange(0, -8, -1, dtype=np.int32)).view(np.float32):",
            _OTHER_FUNCTION,
            "for b in (step.view(np.int32) + np.arange(0, -8, - 2, dtype=np.int32)).view(np.float32):",
        ),
        (
            "if lacking.min() >= 0 and lacking.max() <= 3 and lacking[k >= 124].max(initial=0) <= 1:",
            "what is found lacks that little in any case",
            "if lacking.min() >= 0 and lacking.max() <= 3 and lacking[k > 124].max(initial=0) <= 1:",
            "if lacking.min() >= 0 and lacking.max() <= 4 and lacking[k >= 124].max(initial=0) <= 1:",
        ),
        (
            "_LEAST, _GREATEST = np.float32(2.0**-23), np.float32(1 + 2.0**-20)  # what is smaller has the code 0",
            _CHECKED_LESS,
            "_LEAST, _GREATEST = np.float32(2.0**-23), np.float32(1 - 2.0**-20)  # what is smaller has the code 0",
        ),
        (
            "assert (encoded >= k << 16).all() and (encoded <= (k + 1) << 16).all()",
            _CHECKED_LESS,
            "assert (encoded >= k >> 16).all() and (encoded <= (k + 1) << 16).all()",
        ),
        (
            "code = builder.zext(builder.load(at(builder, codes, i, I8), align=1), I64)",
            "x86 loads and stores at any address",
            "code = builder.zext(builder.load(at(builder, codes, i, I8), align= 2), I64)",
        ),
        (
            "words = [builder.load(at(builder, codes, 16 * i, EIGHT_WORDS), align=1) for i in range(2)]",
            "x86 loads and stores whole vectors at any address",
            "words = [builder.load(at(builder, codes, 16 * i, EIGHT_WORDS), align= 2) for i in range(2)]",
        ),
        (
            "looked_up = _look_up(builder, codes, range(17, 32, 2))",
            "the range ends at the same number",
            "looked_up = _look_up(builder, codes, range(17, 33, 2))",
        ),
    ),
    "cpu_kernels/dlpack.py": (
        (
            "_CACHE_LINE = 16  # items of 4 bytes, of which it takes 12",
            _ROOM,
            "_CACHE_LINE = 17  # items of 4 bytes, of which it takes 12",
            "_CACHE_LINE = 15  # items of 4 bytes, of which it takes 12",
        ),
        (
            "forms = np.empty(8 * len(objects), np.int64)",
            "where there is too little, there is a second pass",
            "forms = np.empty( 9 * len(objects), np.int64)",
            "forms = np.empty( 7 * len(objects), np.int64)",
        ),
        (
            "if report[_USED] > len(forms):",
            "a second pass sees the same",
            "if report[_USED] >= len(forms):",
        ),
        (
            "report[_USED] = -1",
            "whatever is negative",
            "report[_USED] = - 2",
        ),
        (
            "report[_MISSING] = 1",
            "whatever is not 0",
            "report[_MISSING] = 2",
        ),
        (
            "with builder.if_then(failed, likely=False):",
            "a hint",
            "with builder.if_then(failed, likely=True):",
        ),
    ),
    "cpu_kernels/avx512.py": (
        (
            "_FIRST_EXPONENT, _LAST_EXPONENT = 104, 127",
            "all thresholds still lie between",
            "_FIRST_EXPONENT, _LAST_EXPONENT = 105, 127",
            "_FIRST_EXPONENT, _LAST_EXPONENT = 103, 127",
            "_FIRST_EXPONENT, _LAST_EXPONENT = 104, 128",
        ),
        (
            "for octave in range(_LAST_EXPONENT - _FIRST_EXPONENT + 1):",
            "all thresholds still lie between",
            "for octave in range(_LAST_EXPONENT - _FIRST_EXPONENT + 2):",
        ),
        (
            "negative = np.append(-thresholds[:ZERO_CODE][::-1], np.float32(1.0)).view(np.uint32)",
            "the greatest threshold has no negative counterpart, whichever number stands there",
            "negative = np.append(-thresholds[:ZERO_CODE][::-1], np.float32( 2.0)).view(np.uint32)",
            "negative = np.append(-thresholds[:ZERO_CODE][::-1], np.float32( 0.0)).view(np.uint32)",
        ),
        (
            "for bits in range(9):",
            "eight bits are never needed",
            "for bits in range( 10):",
            "for bits in range( 8):",
        ),
        (
            "return addends, shifts, np.array(codes + [0] * (256 - len(codes)), np.uint8)",
            "entries that are never looked up",
            "return addends, shifts, np.array(codes + [ 1] * (256 - len(codes)), np.uint8)",
        ),
        (
            'return call(builder, f"x86.avx512.{name}", args[0].type, *args)',
            "all vectors there are alike",
            'return call(builder, f"x86.avx512.{name}", args[ 1].type, *args)',
            'return call(builder, f"x86.avx512.{name}", args[ -1].type, *args)',
        ),
        (
            "order = list(range(2 * vectors[0].type.count))",
            "all vectors there are alike",
            "order = list(range(2 * vectors[ 1].type.count))",
            "order = list(range(2 * vectors[ -1].type.count))",
        ),
        (
            "return vectors[0]",
            "there is one",
            "return vectors[ -1]",
        ),
        (
            "planes = [_lookup_bytes(builder, plane, codes) for plane in table.view(np.uint8).reshape(-1, 4).T]",
            _NEGATIVE,
            "planes = [_lookup_bytes(builder, plane, codes) for plane in table.view(np.uint8).reshape(- 2, 4).T]",
        ),
        (
            "vectors = _lookup(builder, _QMAP, builder.load(at(builder, args[0], 0, BYTES), align=1))",
            "x86 loads and stores whole vectors at any address",
            "vectors = _lookup(builder, _QMAP, builder.load(at(builder, args[0], 0, BYTES), align= 2))",
        ),
        (
            "builder.store(codes, at(builder, args[2], 0, BYTES), align=1)",
            "x86 loads and stores whole vectors at any address",
            "builder.store(codes, at(builder, args[2], 0, BYTES), align= 2)",
        ),
        (
            'upper = _call(builder, "vpermi2var.hi.512", low, constant(I16, np.arange(1, 64, 2)), high)',
            "NumPy stops at the same number",
            'upper = _call(builder, "vpermi2var.hi.512", low, constant(I16, np.arange(1, 65, 2)), high)',
        ),
        (
            'bucket = _call(builder, "vpermi2var.qi.512", low, constant(I8, np.arange(0, 128, 2)), high)',
            "NumPy stops at the same number",
            'bucket = _call(builder, "vpermi2var.qi.512", low, constant(I8, np.arange(0, 127, 2)), high)',
        ),
        (
            'negative.append(builder.icmp_signed("<", upper, splat(WORDS, 0)))',
            "the code of 0 is its own mirror",
            'negative.append(builder.icmp_signed("<", upper, splat(WORDS, 1)))',
        ),
        (
            'negative.append(builder.icmp_signed("<", upper, splat(WORDS, 0)))',
            "a NaN does not get here",
            'negative.append(builder.icmp_signed("<", upper, splat(WORDS, -1)))',
        ),
    ),
    "lion/functional.py": (
        (
            "if not 1 <= percentile < reference.HISTORY:",
            "the kernel refuses it in the same words",
            "if not 1 <= percentile <= reference.HISTORY:",
            "if not 0 <= percentile < reference.HISTORY:",
        ),
    ),
    "lion/in_backward.py": (
        (
            "processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1",
            "one process or none: both are no others",
            "processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 0",
        ),
        (
            "group = stepper.param_groups[0]",
            "there is one",
            "group = stepper.param_groups[ -1]",
        ),
    ),
    "lion/_options.py": (
        (
            "pair = () if isinstance(betas, (Iterator, Mapping, Set)) else tuple(islice(betas, 3))",
            "neither three nor four are two",
            "pair = () if isinstance(betas, (Iterator, Mapping, Set)) else tuple(islice(betas, 4))",
        ),
    ),
    "lion/_memory/paging.py": (
        (
            "if size > shutil.disk_usage(folder).free:",
            "the two are never equal",
            "if size >= shutil.disk_usage(folder).free:",
        ),
        (
            "_forks = 0",
            "the number is only compared with itself",
            "_forks = 1",
            "_forks = -1",
        ),
        (
            "_forks += 1",
            "the number is only compared with itself",
            "_forks += 2",
        ),
        (
            'with tempfile.TemporaryFile(dir=folder, prefix="lion-", buffering=0) as file:',
            "nothing is written through the file",
            'with tempfile.TemporaryFile(dir=folder, prefix="lion-", buffering= 1) as file:',
            'with tempfile.TemporaryFile(dir=folder, prefix="lion-", buffering= -1) as file:',
        ),
    ),
    "lion/_backends/batch.py": (
        (
            "self.sharded = sharding.is_dtensor(params[0])",
            "all are alike",
            "self.sharded = sharding.is_dtensor(params[ -1])",
        ),
        (
            "self.device = params[0].device",
            "all are alike",
            "self.device = params[ -1].device",
        ),
        (
            "self.dtype = params[0].dtype",
            "all are alike",
            "self.dtype = params[ -1].dtype",
        ),
        (
            "keys = [key for key in (*_ROWS, _MAP) if key in states[0]]",
            "all are alike",
            "keys = [key for key in (*_ROWS, _MAP) if key in states[ -1]]",
        ),
        (
            "self.table[FIRST_ELEMENT] = list(map(sharding.first_element, params)) if weights.seed is not None else 0",
            "without rounding at random nobody reads it",
            "self.table[FIRST_ELEMENT] = list(map(sharding.first_element, params)) if weights.seed is not None else 1",
            "self.table[FIRST_ELEMENT] = list(map(sharding.first_element, params)) if weights.seed is not None else -1",
        ),
        (
            "self.table = np.zeros((11, len(params)), np.int64)",
            "a row that nobody reads",
            "self.table = np.zeros(( 12, len(params)), np.int64)",
        ),
    ),
    "lion/_backends/cpu.py": (
        (
            "return torch.from_numpy(norms)[0]",
            "there is one",
            "return torch.from_numpy(norms)[ -1]",
        ),
        (
            "return torch.from_numpy(scales)[0]",
            "there is one",
            "return torch.from_numpy(scales)[ -1]",
        ),
        (
            "scales = np.ones(1, np.float32)",
            _ROOM,
            "scales = np.ones( 2, np.float32)",
        ),
        (
            "cpu_kernels.percentile_clipping(norms, histories, steps, scales, percentile, 1)",
            _ALONE,
            "cpu_kernels.percentile_clipping(norms, histories, steps, scales, percentile, 2)",
        ),
    ),
    "lion/_backends/selection.py": (
        (
            'return _make(name, device.type == "cpu")',
            "a GPU or the simulator can tell",
            'return _make(name, device.type != "cpu")',
        ),
        (
            'if device.type == "cuda" and name != "cuda":',
            "a GPU or the simulator can tell",
            'if device.type == "cuda" and name == "cuda":',
        ),
    ),
    "lion/_memory/sharding.py": (
        (
            "sums = values if values.device.type == mesh.device_type else values.to(mesh.device_type)",
            "only a GPU can tell",
            "sums = values if values.device.type != mesh.device_type else values.to(mesh.device_type)",
        ),
        (
            'blocks = -(-new["state1"].numel() // reference.BLOCK_SIZE) if key == "absmax1" else 1',
            "a row of one",
            'blocks = -(-new["state1"].numel() // reference.BLOCK_SIZE) if key == "absmax1" else 2',
        ),
        (
            "if is_dtensor(grad) and (grad.placements, grad.device_mesh) != (p.placements, p.device_mesh):",
            "redistributing to the same placements changes nothing",
            "if is_dtensor(grad) or (grad.placements, grad.device_mesh) != (p.placements, p.device_mesh):",
        ),
    ),
    "lion/_plan.py": (
        (
            "_PORTION = 256 * 2**20",
            "how much one call updates: speed and memory only",
            "_PORTION = 256 / 2**20",
            "_PORTION = 256 * 2*20",
            "_PORTION = 257 * 2**20",
            "_PORTION = 255 * 2**20",
            "_PORTION = 256 * 3**20",
            "_PORTION = 256 * 1**20",
            "_PORTION = 256 * 2** 21",
            "_PORTION = 256 * 2** 19",
        ),
        (
            "paged_bytes = 0",
            "how much one call updates: speed and memory only",
            "paged_bytes = 1",
            "paged_bytes = -1",
        ),
        (
            'if lr.device.type == device.type == "cuda":',
            "only a GPU can tell",
            'if lr.device.type != device.type == "cuda":',
        ),
        (
            "return StepCoefficients(_rounded(0.0, betas, weight_decay), lr, weight_decay)",
            "only a GPU can tell",
            "return StepCoefficients(_rounded( 1.0, betas, weight_decay), lr, weight_decay)",
            "return StepCoefficients(_rounded( -1.0, betas, weight_decay), lr, weight_decay)",
        ),
        (
            "turn = turns[memory.data_ptr()] if memory.numel() else 0",
            "an empty parameter is in nobody's way",
            "turn = turns[memory.data_ptr()] if memory.numel() else 1",
            "turn = turns[memory.data_ptr()] if memory.numel() else -1",
        ),
        (
            "turns[memory.data_ptr()] += 1",
            "turns have to differ, no more",
            "turns[memory.data_ptr()] += 2",
        ),
        (
            "paged_bytes += sum(sharding.local(tensor).nbytes for tensor in large) if form.paged else 0",
            "how much one call updates: speed and memory only",
            "paged_bytes += sum(sharding.local(tensor).nbytes for tensor in large) if form.paged else 1",
            "paged_bytes += sum(sharding.local(tensor).nbytes for tensor in large) if form.paged else -1",
        ),
        (
            "mine = [(batch, step) for batch, step in prepared if id(batch.params[0]) in places]",
            "all are alike",
            "mine = [(batch, step) for batch, step in prepared if id(batch.params[ -1]) in places]",
        ),
        (
            'on_gpu = any(batch.device.type == "cuda" for batch, _ in prepared)',
            "only a GPU can tell",
            'on_gpu = any(batch.device.type != "cuda" for batch, _ in prepared)',
        ),
        (
            "if on_device or any(map(bool, rates)) or (on_gpu and torch.cuda.is_current_stream_capturing()):",
            "only a GPU can tell",
            "if on_device or any(map(bool, rates)) or (on_gpu or torch.cuda.is_current_stream_capturing()):",
        ),
        (
            "if on_device or any(map(bool, rates)) or (on_gpu and torch.cuda.is_current_stream_capturing()):",
            "a learning rate that is not 0 is found below, too",
            "if on_device and any(map(bool, rates)) or (on_gpu and torch.cuda.is_current_stream_capturing()):",
            "if on_device or any(map(bool, rates)) and (on_gpu and torch.cuda.is_current_stream_capturing()):",
        ),
    ),
    "lion/_state/adapting.py": (
        (
            "array, absmax = reference.quantize_blockwise(momentum.cpu().numpy(), qmap.cpu().numpy(), max(numel, 1))",
            "one block holds one element or none either way",
            "array, absmax = reference.quantize_blockwise(momentum.cpu().numpy(), qmap.cpu().numpy(), max(numel, 2))",
        ),
    ),
    "lion/_state/checks.py": (
        (
            'f"Invalid state of {name}: unknown key {unknown[0]!r} beside momentum of kind {kind.value}{why}"',
            "any of them may be named",
            'f"Invalid state of {name}: unknown key {unknown[ -1]!r} beside momentum of kind {kind.value}{why}"',
        ),
    ),
    "lion/_state/layout.py": (
        (
            "return int((thresholds < 0).sum())",
            "no threshold is 0",
            "return int((thresholds <= 0).sum())",
        ),
    ),
    "lion/_state/master.py": (
        (
            "return torch.where((pattern ^ upper) < 0, upper, pattern).view(torch.float32)",
            "where both are the same, either may be taken",
            "return torch.where((pattern ^ upper) <= 0, upper, pattern).view(torch.float32)",
            "return torch.where((pattern ^ upper) < 1, upper, pattern).view(torch.float32)",
        ),
    ),
}
