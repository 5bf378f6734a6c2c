from components.evaluate import evaluate

evaluate.main()
