"""Data in the format of COCO: images with boxes, for object detection."""
