from components.wind_tunnel import wind_tunnel

wind_tunnel.main()
