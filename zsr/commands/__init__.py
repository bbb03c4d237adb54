"""The commands of `zsr`: each module has the flags of one, what it would do (`plan`) and how it does it (`work`).

`--help` answers within seconds because no module here imports torch or Ray when it is loaded: what is heavy is imported
where it is used.
"""
