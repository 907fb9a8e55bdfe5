"""LSeg: language-driven semantic segmentation, exported to ONNX and run by PyTorch, ONNX Runtime or TensorRT."""

__version__ = "0.1.0"
