"""What leaves the package in other forms: a decoding step as an ONNX graph, cards of models."""
