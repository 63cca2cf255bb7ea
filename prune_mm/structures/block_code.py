"""Writes the LLVM code of CPU kernels for block-sparse weights; see ``block_kernels`` for how it is run.

The surviving ``N x 1`` blocks of a row block (N outputs) are a dense matrix whose inputs are named by an index. For a
tile of pixels that matrix is a register-blocked product: N x tile sums stay in vector registers while the kernel walks
over the blocks, and each step is one indirect row of the input against N weights:

    for every block k of the row block:   sums[N][tile] += values[k][N] * x[columns[k]][tile]

Pixels are contiguous, so the input needs no packing. A few pixels that do not fill a vector are computed across the
N outputs, which are contiguous in the weights. Every sum runs over the blocks in order, one fused multiply-add a step
(where the processor has one), so results depend neither on the tile nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Fields of a job, each an int64. Pointers are addresses, strides and offsets are in bytes.
JOB = (
    "next_task",  # the counter threads draw their tasks from
    "task_count",
    "tasks",  # int64 (task_count, 5): image, first and last row block, first and last pixel
    "x",
    "y",
    "columns",  # int32, input channel of each block
    "row_pointers",  # int32, where the blocks of each row block start
    "values",  # float32, for each block, for each tap: N weights
    "bias",  # float32, one for each row
    "y_rows",  # int32, output channel of each row
    "taps",  # int64, where each kernel position lies relative to its channel
    "tap_count",
    "x_channel",
    "x_image",
    "y_channel",
    "y_image",
)

#: Left-over pixels that are computed across outputs, where that is cheaper than a masked vector.
_SINGLES = (1, 4)


@dataclass(frozen=True)
class Machine:
    """What the code is shaped by: float32 lanes of a vector, and how many vector registers there are."""

    lanes: int
    registers: int


@dataclass(frozen=True)
class Tile:
    """A tile of pixels: ``vectors`` whole vectors (or the last one masked) and ``singles`` pixels behind them."""

    vectors: int
    singles: int = 0
    masked: bool = False

    @property
    def name(self) -> str:
        """Name of its function in the generated code."""
        return f"@panel_{self.vectors}_{self.singles}{'_masked' if self.masked else ''}"


def row_chunks(n: int, machine: Machine) -> tuple[list[int], int]:
    """How many rows of a block are summed at a time, and how many vectors wide, so that all sums stay in registers.

    Returns:
        Rows of each chunk, nearly equal and falling; vectors of a tile.
    """
    count = -(-n // (8 if machine.registers >= 32 else 4))
    rows = [n // count + (chunk < n % count) for chunk in range(count)]
    # rows x vectors sums, the vectors of the input, one broadcast weight.
    return rows, max(1, min(8, (machine.registers - 1) // (rows[0] + 1)))


def tiles(n: int, machine: Machine) -> list[Tile]:
    """Every tile that the code for blocks of ``n`` rows has a function for."""
    rows, width = row_chunks(n, machine)
    found = [Tile(vectors, masked=masked) for masked in (False, True) for vectors in range(1, width + 1)]
    for singles in _SINGLES:
        fits = [v for v in range(1, width + 1) if (rows[0] + 1) * v + 1 + singles <= machine.registers]
        found += [Tile(vectors, singles) for vectors in (0, *fits) if singles < rows[0] or singles == 1]
    return found


class _Panel:
    """Writes the function that computes one tile of pixels for some row blocks."""

    def __init__(self, n: int, tile: Tile, pointwise: bool, machine: Machine) -> None:
        self.n, self.tile, self.pointwise, self.lanes = n, tile, pointwise, machine.lanes
        self.vector = f"<{self.lanes} x float>"
        # With nothing but sums across outputs, longer vectors mean fewer walks over the blocks.
        rows = row_chunks(n, machine)[0] if tile.vectors else [min(32, n - row) for row in range(0, n, 32)]
        self.chunks = [range(sum(rows[:chunk]), sum(rows[: chunk + 1])) for chunk in range(len(rows))]
        self.lines: list[str] = []
        self.names = 0

    # -- pieces of code ------------------------------------------------------------------------------------------

    def put(self, *lines: str) -> None:
        self.lines += lines

    def let(self, expression: str, name: str = "") -> str:
        """Give the value of an expression a name, a fresh one unless it has one."""
        self.names += 1
        name = name or f"%v{self.names}"
        self.put(f"  {name} = {expression}")
        return name

    def load(self, kind: str, address: str) -> str:
        return self.let(f"load {kind}, ptr {self.let(f'inttoptr i64 {address} to ptr')}, align 4")

    def store(self, kind: str, value: str, address: str) -> None:
        self.put(f"  store {kind} {value}, ptr {self.let(f'inttoptr i64 {address} to ptr')}, align 4")

    def index(self, address: str) -> str:
        return self.let(f"sext i32 {self.load('i32', address)} to i64")

    def shifted(self, address: str, offset: int) -> str:
        return self.let(f"add i64 {address}, {offset}") if offset else address

    def element(self, base: str, index: str, size: int | str) -> str:
        return self.let(f"add i64 {base}, {self.let(f'mul i64 {index}, {size}')}")

    def splat(self, kind: str, value: str, lanes: int) -> str:
        one = self.let(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i32 0")
        many = f"<{lanes} x {kind}>"
        return self.let(f"shufflevector {many} {one}, {many} poison, <{lanes} x i32> zeroinitializer")

    def multiply_add(self, lanes: int, a: str, b: str, total: str) -> None:
        kind = f"<{lanes} x float>"
        self.let(f"call {kind} @llvm.fmuladd.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {total})", f"{total}.next")

    # -- the function --------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The whole function."""
        self.put(
            f"define internal void {self.tile.name}(ptr %job, i64 %x, i64 %y, i64 %first, i64 %last, i64 %left) "
            "noinline {",
            "entry:",
        )
        self.put(*(_field(name) for name in JOB[5:15]))
        if self.tile.masked:
            rest = self.splat("i64", self.let(f"sub i64 %left, {(self.tile.vectors - 1) * self.lanes}"), self.lanes)
            lanes = ", ".join(f"i64 {lane}" for lane in range(self.lanes))
            self.put(f"  %mask = icmp slt <{self.lanes} x i64> <{lanes}>, {rest}")
        self.put("  br label %rows", "rows:", "  %b = phi i64 [ %first, %entry ], [ %b.next, %next ]")
        self.put(f"  br i1 {self.let('icmp slt i64 %b, %last')}, label %row, label %exit", "row:")
        start = self.element("%row_pointers", "%b", 4)
        bounds, taps = (self.index(start), self.index(self.shifted(start, 4))), 1 if self.pointwise else "%tap_count"
        for end, bound in enumerate(bounds):
            self.put(f"  %k{end} = add i64 {bound}, 0", f"  %s{end} = mul i64 {bound}, {taps}")
        self.put(f"  %top = mul i64 %b, {self.n}")
        self.put("  br label %chunk0")
        for chunk, rows in enumerate(self.chunks):
            self.chunk(chunk, rows)
        self.put(f"chunk{len(self.chunks)}:", "  br label %next")
        self.put("next:", "  %b.next = add i64 %b, 1", "  br label %rows", "exit:", "  ret void", "}")
        return "\n".join(self.lines)

    def chunk(self, chunk: int, rows: range) -> None:
        """Bias, the walk over the blocks, and the results of some rows of a block."""
        tile, step = self.tile, f"%s.{chunk}"
        sums = [(row, v) for row in rows for v in range(tile.vectors)]
        self.put(f"chunk{chunk}:")
        starts = self.biases(rows)
        self.put(f"  br label %head{chunk}", f"head{chunk}:")
        came = f"[ {{}}, %chunk{chunk} ], [ {{}}, %body{chunk} ]"
        self.put(f"  {step} = phi i64 {came.format('%s0', f'{step}.next')}")
        if not self.pointwise:
            self.put(f"  %k.{chunk} = phi i64 {came.format('%k0', f'%k.{chunk}.next')}")
            self.put(f"  %t.{chunk} = phi i64 {came.format('0', f'%t.{chunk}.next')}")
        for row, v in sums:
            self.put(f"  %a{row}_{v} = phi {self.vector} {came.format(starts[row, v], f'%a{row}_{v}.next')}")
        for single in range(tile.singles):
            name = f"%o{chunk}_{single}"
            self.put(f"  {name} = phi <{len(rows)} x float> {came.format(starts[None], f'{name}.next')}")
        self.put(f"  %more{chunk} = icmp slt i64 {step}, %s1")
        self.put(f"  br i1 %more{chunk}, label %body{chunk}, label %done{chunk}", f"body{chunk}:")
        self.body(chunk, rows)
        self.put(f"  br label %head{chunk}", f"done{chunk}:")
        self.results(chunk, rows)
        self.put(f"  br label %chunk{chunk + 1}")

    def biases(self, rows: range) -> dict:
        """What the sums start from, by (row, vector); under None the biases of all rows as one vector."""
        address, found = self.element("%bias", "%top", 4), {}
        for row in rows if self.tile.vectors else ():
            value = self.splat("float", self.load("float", self.shifted(address, 4 * row)), self.lanes)
            found |= {(row, v): value for v in range(self.tile.vectors)}
        if self.tile.singles:
            found[None] = self.load(f"<{len(rows)} x float>", self.shifted(address, 4 * rows.start))
        return found

    def body(self, chunk: int, rows: range) -> None:
        """One block at one kernel position."""
        tile, step, k = self.tile, f"%s.{chunk}", f"%k.{chunk}"
        column = self.index(self.element("%columns", step if self.pointwise else k, 4))
        x = self.element("%x", column, "%x_channel")
        if not self.pointwise:
            tap = self.let(f"inttoptr i64 {self.element('%taps', f'%t.{chunk}', 8)} to ptr")
            x = self.let(f"add i64 {x}, {self.let(f'load i64, ptr {tap}, align 8')}")
            after = self.let(f"add i64 %t.{chunk}, 1")
            last = self.let(f"icmp eq i64 {after}, %tap_count")
            self.put(f"  %t.{chunk}.next = select i1 {last}, i64 0, i64 {after}")
            self.put(f"  {k}.next = add i64 {k}, {self.let(f'zext i1 {last} to i64')}")
        values = self.shifted(self.element("%values", step, 4 * self.n), 4 * rows.start)
        if tile.singles:
            across = self.load(f"<{len(rows)} x float>", values)
        for single in range(tile.singles):
            pixel = self.load("float", self.shifted(x, 4 * (tile.vectors * self.lanes + single)))
            pixel = self.splat("float", pixel, len(rows))
            self.multiply_add(len(rows), across, pixel, f"%o{chunk}_{single}")
        inputs = [self.load_vector(self.shifted(x, 4 * v * self.lanes), v) for v in range(tile.vectors)]
        for offset, row in enumerate(rows if tile.vectors else ()):
            weight = self.splat("float", self.load("float", self.shifted(values, 4 * offset)), self.lanes)
            for v, value in enumerate(inputs):
                self.multiply_add(self.lanes, weight, value, f"%a{row}_{v}")
        self.put(f"  {step}.next = add i64 {step}, 1")

    def load_vector(self, address: str, v: int) -> str:
        """The v-th vector of the tile."""
        if not (self.tile.masked and v == self.tile.vectors - 1):
            return self.load(self.vector, address)
        pointer, lanes = self.let(f"inttoptr i64 {address} to ptr"), self.lanes
        return self.let(
            f"call {self.vector} @llvm.masked.load.v{lanes}f32.p0(ptr {pointer}, i32 4, <{lanes} x i1> %mask, "
            f"{self.vector} zeroinitializer)"
        )

    def results(self, chunk: int, rows: range) -> None:
        """Store all sums."""
        tile, lanes = self.tile, self.lanes
        table = self.element("%y_rows", "%top", 4)
        for offset, row in enumerate(rows):
            address = self.element("%y", self.index(self.shifted(table, 4 * row)), "%y_channel")
            for v in range(tile.vectors):
                place = self.shifted(address, 4 * v * lanes)
                if tile.masked and v == tile.vectors - 1:
                    pointer = self.let(f"inttoptr i64 {place} to ptr")
                    self.put(
                        f"  call void @llvm.masked.store.v{lanes}f32.p0({self.vector} %a{row}_{v}, ptr {pointer}, "
                        f"i32 4, <{lanes} x i1> %mask)"
                    )
                else:
                    self.store(self.vector, f"%a{row}_{v}", place)
            for single in range(tile.singles):
                value = self.let(f"extractelement <{len(rows)} x float> %o{chunk}_{single}, i32 {offset}")
                self.store("float", value, self.shifted(address, 4 * (tile.vectors * lanes + single)))


def _field(name: str) -> str:
    """Code that loads a field of the job under its name."""
    return (
        f"  %{name}.at = getelementptr i64, ptr %job, i64 {JOB.index(name)}\n"
        f"  %{name} = load i64, ptr %{name}.at, align 8"
    )


_DRIVER = """
define void @run(ptr %job) {{
entry:
{fields}
  br label %take
take:
  %t = atomicrmw add ptr %job, i64 1 monotonic
  %more = icmp slt i64 %t, %task_count
  br i1 %more, label %task, label %exit
task:
  %t.size = mul i64 %t, 40
  %t.at = add i64 %tasks, %t.size
  %t.ptr = inttoptr i64 %t.at to ptr
{task}
  %x.offset = mul i64 %image, %x_image
  %x.here = add i64 %x, %x.offset
  %y.offset = mul i64 %image, %y_image
  %y.here = add i64 %y, %y.offset
  br label %pixels
pixels:
  %p = phi i64 [ %p0, %task ], [ %p.next, %whole ]
  %left = sub i64 %p1, %p
  %any = icmp sgt i64 %left, 0
  br i1 %any, label %tile, label %take
tile:
  %p.size = mul i64 %p, 4
  %xp = add i64 %x.here, %p.size
  %yp = add i64 %y.here, %p.size
  switch i64 %left, label %other [ {exact} ]
other:
  %big = icmp sgt i64 %left, {width}
  br i1 %big, label %whole, label %rest
whole:
  call void {full}({arguments})
  %p.next = add i64 %p, {width}
  br label %pixels
rest:
  %left.less = sub i64 %left, 1
  %vectors = udiv i64 %left.less, {lanes}
  switch i64 %vectors, label %exit [ {masked} ]
{cases}
exit:
  ret void
}}
"""


def kernel_text(n: int, pointwise: bool, machine: Machine) -> str:
    """LLVM code of ``void run(int64_t *job)`` for blocks of ``n`` rows; ``pointwise``: one kernel position."""
    lanes, (rows, vectors) = machine.lanes, row_chunks(n, machine)
    every = tiles(n, machine)
    arguments = "ptr %job, i64 %xp, i64 %yp, i64 %lo, i64 %hi, i64 %left"
    exact = {tile: tile.vectors * lanes + tile.singles for tile in every if not tile.masked}
    # With few lanes two tiles may have the same pixels: a later one has more singles, the first one wins.
    exact = {size: tile for tile, size in reversed(exact.items())}
    masked = [tile for tile in every if tile.masked]
    label = {tile: f"case{tile.name[1:]}" for tile in every}
    sizes = {len(range(n)[start : start + 32]) for start in range(0, n, 32)} | {lanes} | set(rows)
    names = ("image", "lo", "hi", "p0", "p1")
    driver = _DRIVER.format(
        fields="\n".join(_field(name) for name in ("task_count", "tasks", "x", "y", "x_image", "y_image")),
        task="\n".join(
            f"  %{name}.at = getelementptr i64, ptr %t.ptr, i64 {index}\n  %{name} = load i64, ptr %{name}.at, align 8"
            for index, name in enumerate(names)
        ),
        exact=" ".join(f"i64 {size}, label %{label[tile]}" for size, tile in exact.items()),
        masked=" ".join(f"i64 {tile.vectors - 1}, label %{label[tile]}" for tile in masked),
        full=Tile(vectors).name,
        width=vectors * lanes,
        lanes=lanes,
        arguments=arguments,
        cases="\n".join(
            f"{label[tile]}:\n  call void {tile.name}({arguments})\n  br label %take"
            for tile in [*exact.values(), *masked]
        ),
    )
    vector, mask = f"<{lanes} x float>", f"<{lanes} x i1>"
    declared = [f"declare <{s} x float> @llvm.fmuladd.v{s}f32({', '.join([f'<{s} x float>'] * 3)})" for s in sizes]
    declared.append(f"declare {vector} @llvm.masked.load.v{lanes}f32.p0(ptr, i32, {mask}, {vector})")
    declared.append(f"declare void @llvm.masked.store.v{lanes}f32.p0({vector}, ptr, i32, {mask})")
    needed = dict.fromkeys([*exact.values(), *masked, Tile(vectors)])
    return "\n".join([*declared, *(_Panel(n, tile, pointwise, machine).text() for tile in needed), driver])
