"""TensorFlow Federated as the reference: its environment, its process, and the cases it runs."""
