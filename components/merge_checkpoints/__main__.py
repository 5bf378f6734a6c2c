from components.merge_checkpoints import merge_checkpoints

merge_checkpoints.main()
