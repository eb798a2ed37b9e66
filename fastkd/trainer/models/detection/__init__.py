"""Object detectors: torchvision's Faster R-CNN on any backbone, and what distillation reads of it."""
