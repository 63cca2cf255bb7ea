# ResNeXt-20 32x1d of Hinge.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.CIFARResNeXt", depth=20),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=256, loss=dict(type="CrossEntropyLoss")),
)
