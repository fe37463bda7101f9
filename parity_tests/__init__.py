"""jaxfed against TensorFlow Federated, rung by rung."""
