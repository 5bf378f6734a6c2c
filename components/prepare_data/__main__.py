from components.prepare_data import prepare_data

prepare_data.main()
