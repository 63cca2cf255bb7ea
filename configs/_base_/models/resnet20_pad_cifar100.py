# ResNet-20 of Hinge, 100 classes.
_base_ = "./resnet20_pad_cifar10.py"

model = dict(head=dict(num_classes=100))
