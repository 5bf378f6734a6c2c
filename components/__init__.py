"""One package per phase: its typed inputs and outputs, and a short run that calls the library."""
