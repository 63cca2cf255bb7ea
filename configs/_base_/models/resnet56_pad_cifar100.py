# ResNet-56 of Hinge, 100 classes.
_base_ = "./resnet56_pad_cifar10.py"

model = dict(head=dict(num_classes=100))
