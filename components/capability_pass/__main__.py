from components.capability_pass import capability_pass

capability_pass.main()
