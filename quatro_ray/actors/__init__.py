"""Ray actors, and the clients and pools through which the controller calls them."""
