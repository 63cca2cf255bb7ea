# WRN-16-10 of Hinge.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.WideResNet", depth=16, widen_factor=10),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=640, loss=dict(type="CrossEntropyLoss")),
)
