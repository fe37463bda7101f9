"""The same federated training in jaxfed and in its peers, each in a process of its own."""
