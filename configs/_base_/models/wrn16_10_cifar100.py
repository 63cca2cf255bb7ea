# WRN-16-10 of Hinge, 100 classes.
_base_ = "./wrn16_10_cifar10.py"

model = dict(head=dict(num_classes=100))
