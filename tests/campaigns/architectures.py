"""Do 80 architectures of different families become models? `-m tests.campaigns.architectures [NAME...]`.

Each is created, grouped in three ways, compared with its library's own features, and trained for a step frozen and for
one unfrozen. It needs the extra timm, half an hour on two cores, and no network.
"""

import gc
import sys
import time
import traceback
import warnings

from tests.kit.architectures import try_out

TORCHVISION = (
    *("alexnet", "convnext_tiny", "convnext_small", "densenet121", "densenet161", "densenet169", "densenet201"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large"),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_3_2gf", "resnet18"),
    *("resnet34", "resnet50", "resnet101", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x2_0"),
    *("squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn", "vit_b_16", "vit_b_32"),
    *("wide_resnet50_2", "tiny"),
)
TIMM = (
    *("convnextv2_atto", "convnext_atto", "resnet18", "resnet26d", "resnetv2_18", "seresnet18", "skresnet18"),
    *("res2net50_14w_8s", "resnest14d", "regnety_002", "regnetv_040", "efficientnet_lite0", "tf_efficientnet_lite0"),
    *("efficientnetv2_rw_t", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs"),
    *(
        "vit_tiny_patch16_224",
        "vit_small_patch16_dinov3.lvd1689m",
        "deit3_small_patch16_224",
        "beitv2_base_patch16_224",
    ),
    *("eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_pico_rw_256"),
    *("coatnet_nano_rw_224", "caformer_s18", "densenet121", "vgg11", "dla34", "hrnet_w18_small", "ghostnet_050"),
    *("edgenext_xx_small", "fastvit_t8", "repvit_m0_9", "pvt_v2_b0", "xcit_nano_12_p8_224", "levit_128s"),
    *("mambaout_femto", "nfnet_f0", "mixer_s16_224", "inception_v3", "xception41", "volo_d1_224", "hgnetv2_b0"),
)


def main(chosen: list[str]) -> int:
    """A line for each, and how many did not hold."""
    wrong = 0
    for name in chosen or [*TORCHVISION, *(f"timm/{each}" for each in TIMM)]:
        begin = time.monotonic()
        try:
            tried = try_out(name)
        except Exception as error:
            wrong += 1
            print(f"{name:<40} WRONG {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", flush=True)
            if chosen:
                traceback.print_exc()
            continue
        head = "normed linear" if tried.pooled else "concat pool"
        print(
            f"{name:<40} {tried.millions:6.1f} M  groups {'/'.join(map(str, tried.groups)):<9} stages {tried.stages}  "
            f"{head:<13}  {tried.side_px} px  losses {tried.losses[0]:.3f} {tried.losses[1]:.3f}  "
            f"{time.monotonic() - begin:5.1f} s",
            flush=True,
        )
        gc.collect()
    print(f"{wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
