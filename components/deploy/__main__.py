from components.deploy import deploy

deploy.main()
