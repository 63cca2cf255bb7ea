# ResNet-110, 100 classes.
_base_ = "./resnet110_cifar10.py"

model = dict(head=dict(num_classes=100))
