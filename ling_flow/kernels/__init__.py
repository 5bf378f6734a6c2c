"""Operations of the model, one per file: torch reference and a dispatching function. Imports nothing else of ours."""
