"""WSM: merge weights from decay curves, and the streaming merge of checkpoints."""
