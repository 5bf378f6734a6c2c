from toy.average import average

average.main()
