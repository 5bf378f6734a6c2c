from components.register import register

register.main()
