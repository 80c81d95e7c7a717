"""Training of the small bundled model, from texts to the folder ``load_compressor`` loads.

``python -m ctxdocs.training.bundled --data DIR --output DIR --minutes 60`` prepares the data, trains, measures and
writes the model card. It runs on a CPU or a GPU (``--preset gpu-40m``), and goes on where it stopped when it is
started again with the same ``--output``. Minutes are training time over all runs into that folder; the learning rate
ends at zero with them. ``--evaluate-only`` measures a folder again.

On a Linux CPU two settings make a step two to three times as fast, most of all on a machine that does other work too:
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184`` (freed memory is kept, which saves page faults) and
``GOMP_SPINCOUNT=1000`` (threads that wait give the core away). ``--compile`` fuses what lies between the matrix
products.
"""
