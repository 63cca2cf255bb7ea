# The topology of CondenseNet-86, 100 classes.
_base_ = "./condensenet86_cifar10.py"

model = dict(head=dict(num_classes=100))
