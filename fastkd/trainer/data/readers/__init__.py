"""Readers of data sets: images in folders and shards, CIFAR, sets of torchvision, tensors in memory."""
