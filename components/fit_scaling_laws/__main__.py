from components.fit_scaling_laws import fit_scaling_laws

fit_scaling_laws.main()
