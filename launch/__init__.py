"""The `t5pegasus` command and the ways to run it."""
