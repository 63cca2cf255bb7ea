# ResNet-56, 100 classes.
_base_ = "./resnet56_cifar10.py"

model = dict(head=dict(num_classes=100))
