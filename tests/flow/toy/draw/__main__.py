from toy.draw import draw

draw.main()
