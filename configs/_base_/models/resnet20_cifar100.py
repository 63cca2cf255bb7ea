# ResNet-20, 100 classes.
_base_ = "./resnet20_cifar10.py"

model = dict(head=dict(num_classes=100))
