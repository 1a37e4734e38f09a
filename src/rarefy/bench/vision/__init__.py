"""One-shot pruning of convolutions, judged on a pretrained ResNet-20 and the 10,000 test images of CIFAR-10."""
