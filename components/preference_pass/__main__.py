from components.preference_pass import preference_pass

preference_pass.main()
