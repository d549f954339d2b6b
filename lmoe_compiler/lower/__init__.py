"""Stop 5 of the walk: recurrence -> chunk program -> adjoint chunk program, and both run with ATen.

algebra.py      constructors of chunk expressions          ops.py        what each op computes, and its vjp
chunk.py        Program -> ChunkProgram                    decayed.py    products under a diagonal decay
adjoint.py      ChunkProgram -> ChunkAdjoint               program.py    the two, as data

execute.py      the five functions of a recurrence on CPU
chunked.py      a chunk program over a sequence, forward and backward     sequential.py   token by token
hoist.py        what a loop over chunks need not do        phases.py      loops, and all else batched over chunks
rows.py         layouts of chunks and packed documents     spans.py       S_out = M S_in + E of a span
"""
