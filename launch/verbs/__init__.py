"""One module per verb of the `t5pegasus` command: parse, build, call."""
