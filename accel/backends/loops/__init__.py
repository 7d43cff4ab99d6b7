"""What every kernel generator shares: where elements lie, and which loops compute a region.

`index` is the arithmetic of positions, `trace` the walk from a value to what its elements are made
of, `survey` the analysis of that walk, `phases` the plan of loop nests, and `merge` says which
loops can become one. None of them knows what language the code is written in.
"""
