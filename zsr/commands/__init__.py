"""The commands of `zsr`, one module each: its flags, a dry run (`plan`) and the command itself (`work`).

`--help` answers within seconds because no module here imports torch or Ray at import time: heavy packages are imported
inside the functions that use them.
"""
