"""From sources to batches: documents, tokenizer, token shards, mixture, chat format and reasoning tasks."""
