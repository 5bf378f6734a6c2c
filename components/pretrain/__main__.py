from components.pretrain import pretrain

pretrain.main()
