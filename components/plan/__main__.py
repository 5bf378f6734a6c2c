from components.plan import plan

plan.main()
