"""The probes of HEST-Benchmark: its ridge on frozen features, by the steps of its own code.

Shapes: N spots, of which n are learnt from and m predicted, F features, G genes.
"""

import numpy as np
import pandas as pd
from sklearn import linear_model
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from study import methods, splitting
from study.features import encode_spots

COMPONENTS = 256
SEED = 1  # of the benchmark's runs


def name_probes(backbone):
    """{setting: {CONSTANT: value}} of the two probes that HEST-Benchmark describes."""
    # They see single spots, and learn from validation spots anyway.
    plain = {"NEIGHBOURHOOD": False, "REFIT": False}
    return {
        f"hest probe ({backbone})": plain,
        f"hest probe ({backbone}, full width)": plain | {"FULL_WIDTH": True},
    }


def hest_probe(row):
    """A method: a probe of HEST-Benchmark on frozen features of BACKBONE.

    Features of the last stage, of the patch as it is, in fp32 whatever PRECISION is; of all spots
    of the training slides, since the probe needs no validation; log1p of raw counts without a
    normalisation by depth (st_dataset.py in src/hest/bench of the repository mahmoodlab/HEST).

    What differs: the spots of a sample stand by their rows and not as in its file of patches, on
    which the random steps of PCA depend where there are fewer spots than features. The benchmark's
    row ResNet50 ends after the third of the four stages of timm's resnet50.tv_in1k
    (inference_models.py), so that of resnet50 here is another one.
    """
    plain = row.recipe | {"POOL_STAGES": False, "PRECISION": "fp32"}
    features, _ = encode_spots(row.split.data, plain, row.split.seed)
    row.note(weights=methods.name_weights(row.recipe))
    return predict_by_probe(row, features)


def predict_by_probe(row, features):
    """(n, G) by hest_probe on features (N, F); NaN of validation spots, which it learns from."""
    split = row.split
    train = order_by_fold_file(split)
    scored = split.scored()
    predicted, alpha = probe_features(
        features[train],
        split.data.target[train],
        features[scored],
        full_width="FULL_WIDTH" in row.recipe,
    )
    row.note(alpha=alpha)
    predicted[split.roles[scored] == "valid"] = np.nan
    return predicted.astype(np.float32)


def probe_features(features, target, seen, *, full_width):
    """(prediction (m, G) from features `seen` (m, F), alpha) of HEST-Benchmark's ridge, which
    learns target (n, G) from features (n, F) float32.

    benchmark.py and trainer.py do this: for all genes at once Ridge without intercept, solver lsqr
    of at most 1,000 steps and scikit-learn's tolerance, alpha = 100 / (columns x genes). The
    benchmark's README reduces the features to 256 columns before; Table A13 of its paper takes them
    at full width, neither standardised nor reduced, and ranks models otherwise (issue 144 there).
    """
    if not full_width:
        features, seen = reduce_features(features, seen)
    alpha = 100 / (features.shape[1] * target.shape[1])
    ridge = linear_model.Ridge(alpha, fit_intercept=False, solver="lsqr", max_iter=1000)
    ridge.fit(features, target)
    return ridge.predict(seen), alpha


def reduce_features(features, seen):
    """The features (n, F) and (m, F), standardised and reduced to their 256 principal components by
    the first ones; of fewer spots or features as many components are taken as there can be.

    They are rounded to single precision, and the ridge computes in double from there on, as
    scikit-learn does with the tensors that the benchmark hands to it.
    """
    n_components = min(COMPONENTS, *features.shape)
    reduce = make_pipeline(StandardScaler(), PCA(n_components, random_state=SEED))
    return round_to_single(reduce.fit_transform(features)), round_to_single(reduce.transform(seen))


def round_to_single(values):
    """The values as single precision holds them, in double precision."""
    return values.astype(np.float32).astype(np.float64)


def order_by_fold_file(split):
    """Numbers of all spots of a fold's training slides, slide by slide as its file names them."""
    train = split.spots("train", "valid")
    folds = splitting.read_task_folds(split.data.root)
    named = folds[(folds["fold"] == split.fold) & (folds["role"] == "train")]["tissue_index"]
    place = pd.Series(range(len(named)), named.to_numpy())
    slides = split.data.spots["tissue_index"].to_numpy()[train]
    return train[np.lexsort([train, place[slides]])]
