"""A task of HEST-Benchmark from its folder to the number of its tables: folds, genes, target, probe
and statistic, each held against a few lines of its own.
"""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import (
    TINY,
    expect_refusal,
    load_script,
    metadata_of,
    printed_table,
    refused,
    run_script,
    stdout_of,
    table_of,
)
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from test_files import GENES
from test_hest import make_anndata, make_patches
from test_weights import SMALL, weights_of

import common
from slides.manifest import check_sources
from study import probes, splitting
from study.features import encode_spots
from study.rows import Row

SAMPLES = ("TENX1", "NCBI2", "MEND3")
TASK_GENES = GENES[10:16]
SPOTS = 34  # of the 36 of a sample have a patch
# Samples that train and those that test.
SPLITS = ((SAMPLES[:2], SAMPLES[2:]), (SAMPLES[2:], SAMPLES[:2]))
HEST = {"protocol": "hest", "target": "log1p"}
NETWORK = TINY | HEST | {"backbone": SMALL, "hidden": 0, "epochs": 2}


# -------------------------------------------------------------------------------- an invented task
def write_split(folder, role, fold, samples):
    rows = [[name, f"patches/{name}.h5", f"adata/{name}.h5ad"] for name in samples]
    table = pd.DataFrame(rows, columns=["sample_id", "patches_path", "expr_path"])
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "splits" / f"{role}_{fold}.csv", index=False)


def make_task(folder, genes=TASK_GENES):
    """A task of three samples and two folds; the second one tests on two samples."""
    for fold, (train, test) in enumerate(SPLITS):
        write_split(folder, "train", fold, train)
        write_split(folder, "test", fold, test)
    (folder / "adata").mkdir()
    for seed, name in enumerate(SAMPLES, 1):
        make_anndata(seed).write_h5ad(folder / "adata" / f"{name}.h5ad")
        make_patches(folder, name, spots=SPOTS, seed=seed)
    (folder / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("tasks") / "IDC")


@pytest.fixture(scope="module")
def root(task, tmp_path_factory):
    """The data root that script 19 makes of the task."""
    root = tmp_path_factory.mktemp("data") / "IDC"
    printed = stdout_of("19", data_root=root, from_hest=task)
    assert "panel of 6 genes" in printed
    assert "warning" not in printed
    return root


@pytest.fixture(scope="module")
def data(root):
    return common.load_dataset(root, "log1p")


@pytest.fixture(scope="module")
def splits(root, data):
    recipe = {"PROTOCOL": "hest", "TARGET": "log1p", "DATA_ROOT": str(root)}
    recipe |= {"VALID_FRACTION": 0.2}
    roles = splitting.split_spots(data.spots, recipe, 42)
    return [splitting.make_split(data, own, recipe, 42, fold) for fold, own in enumerate(roles)]


@pytest.fixture(scope="module")
def scored(root, tmp_path_factory):
    """(output folder, what script 20 printed) of a tiny network beside the probe."""
    out = tmp_path_factory.mktemp("runs")
    weights = weights_of(out / "weights")
    return out, stdout_of("20", data_root=root, out=out, **(NETWORK | {"pretrained": weights}))


def counts_of(task, data):
    """(N, G) raw counts of the data's spots and genes, as the task's own files hold them."""
    names = pd.read_csv(data.root / "slides.csv").set_index("tissue_index")["name"]
    tables = {name: anndata.read_h5ad(task / "adata" / f"{name}.h5ad").to_df() for name in SAMPLES}
    spots = data.spots[["tissue_index", "barcode"]].to_numpy()
    return np.array([tables[names[slide]].loc[barcode, data.genes] for slide, barcode in spots])


# ------------------------------------------------------------------------------------------ folds
def test_spots_are_those_that_have_a_patch_and_genes_are_the_tasks(data):
    assert data.spots.groupby("tissue_index").size().tolist() == [SPOTS] * 3
    assert sorted(data.genes) == sorted(TASK_GENES)
    assert set(data.meta["um_per_px"].values()) == {0.5}


@pytest.mark.parametrize("outside", [0, 1])
def test_spots_without_a_patch_are_called_so(tmp_path, outside):
    task = make_task(tmp_path / "IDC")
    path = task / "adata" / "NCBI2.h5ad"
    table = anndata.read_h5ad(path)
    # One that has a patch, and some that have none.
    table.obs["in_tissue"] = [0, *[1] * SPOTS, *[0] * outside, 1][: table.n_obs]
    table.write_h5ad(path)
    printed = stdout_of("19", data_root=tmp_path / "mine", from_hest=task, check=True)
    lines = [line.strip() for line in printed.splitlines() if "kept; 2 left out" in line]
    others = "spots       34 kept; 2 left out (2 without a patch)"
    changed = others
    if outside:
        changed = "spots       34 kept; 2 left out (1 not in_tissue, 1 without a patch)"
    assert sorted(lines) == sorted([others, others, changed])


def test_folds_are_the_benchmarks_and_no_test_spot_trains(root, splits):
    names = pd.read_csv(root / "slides.csv").set_index("tissue_index")["name"]
    assert len(splits) == len(SPLITS)
    for split, (train, test) in zip(splits, SPLITS, strict=True):
        assert set(names[split.slides("train", "valid")]) == set(train)
        assert set(names[split.slides("test")]) == set(test)
        assert len(split.spots("train", "valid", "test")) == 3 * SPOTS
        assert len(split.spots("valid")) == round(0.2 * SPOTS * len(train))
        assert split.members["all"] == split.data.genes


@pytest.mark.parametrize("name", [common.TASK_FOLDS, common.TASK_GENES])
def test_folds_that_changed_after_19_are_refused(root, tmp_path, name):
    """Ceilings of the folds, and the panel, are those of then."""
    mine = tmp_path / "IDC"
    shutil.copytree(root, mine, symlinks=True)
    lines = (mine / name).read_text().splitlines(keepends=True)
    (mine / name).write_text("".join(lines[:-1]))
    meta = json.loads((mine / "dataset" / "meta.json").read_text())
    with refused(f"{name}: ", " bytes, and ", " when the dataset"):
        check_sources(mine, meta)
    (mine / name).unlink()
    check_sources(mine, meta)


def test_target_is_log1p_of_raw_counts(task, root, data):
    expected = np.log1p(counts_of(task, data))
    np.testing.assert_allclose(data.target, expected, rtol=1e-6)
    written = pd.read_csv(root / "dataset" / "dataset.csv")[data.genes]
    np.testing.assert_allclose(written, expected, rtol=1e-6)


def test_a_second_start_without_the_task_keeps_its_genes_and_target(task, root, data, tmp_path):
    again = tmp_path / "again"
    stdout_of("19", data_root=again, from_hest=task)
    assert "target log1p" in stdout_of("19", data_root=again)
    assert common.load_dataset(again, "log1p").genes == data.genes


def test_donor_is_the_patient_that_metadata_name(task, tmp_path):
    rows = {"id": SAMPLES, "patient": ["P1", "P1", ""], "dataset_title": "A title"}
    path = task / "HEST_v1_1_0.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    stdout_of("19", data_root=tmp_path / "mine", from_hest=task, check=True)
    path.unlink()
    manifest = pd.read_csv(tmp_path / "mine" / "slides.csv").set_index("name")
    expected = {"TENX1": "A title P1", "NCBI2": "A title P1", "MEND3": "MEND3"}
    assert manifest["donor"].to_dict() == expected


# ------------------------------------------------------------------------------------------ scores
def test_weights_hold_validation_against_the_target(scored):
    out, _ = scored
    for path in out.glob("*/weights.safetensors"):
        told = metadata_of(path)
        r = np.array(told["valid_r"], float)
        np.testing.assert_array_equal(np.array(told["evidence"]["genes"]["r"], float), r)
        genes = pd.read_csv(path.with_name("per_gene.csv"))
        np.testing.assert_allclose(r, genes["valid_log1p_r"], atol=1e-9)


def test_the_statistic_is_the_mean_over_folds_of_r_over_all_their_test_spots(scored):
    out, stdout = scored
    rows = table_of(stdout).query("split == 'test' and truth == 'log1p'")
    folders = rows[rows["setting"] == SMALL].sort_values("fold")["folder"]
    means = []
    for folder in folders:
        table = anndata.read_h5ad(out / folder / "predictions.h5ad")
        table = table[table.obs["role"] == "test"]
        pairs = zip(table.X.T, table.layers["target"].T, strict=True)
        means.append(np.mean([scipy.stats.pearsonr(x, y)[0] for x, y in pairs]))
    assert len(means) == 2
    head, lines = printed_table(stdout, "mean Pearson r")
    assert head.split()[1:3] == ["HEST", "r"]
    (line,) = [line for line in lines if line.startswith(SMALL)]
    assert line.split()[1] == f"{np.mean(means):.3f}±{np.std(means, ddof=1):.3f}"
    np.testing.assert_allclose(rows[rows["setting"] == SMALL]["all_pooled"], means, atol=1e-6)


def test_the_header_says_what_the_protocol_sees_and_the_table_has_both_probes(scored):
    head, lines = printed_table(scored[1], "mean Pearson r")
    assert "of ceiling" in head and "HEST r minus ridge (colour)" in head
    reduced, full = [line for line in lines if line.startswith("hest probe (")]
    assert "full width)" in full and "full width)" not in reduced
    assert all("[" in line and "%" in line for line in (reduced, full))
    printed = " ".join(scored[1].split())
    assert "hest (folds and genes of HEST-Benchmark" in printed
    assert "random spots of the training slides are held out" in printed
    assert "log1p (log1p of raw counts" in printed


def test_a_report_is_of_the_benchmarks_number(scored):
    out, _ = scored
    assert run_script("27", run=out) == 0
    page = (out / "report.html").read_text()
    assert "HEST r is the mean over the genes" in page
    assert "log1p of raw counts" in page
    script, facts = load_script("27"), json.loads((out / "run.json").read_text())
    rows = script.read_rows_of_run(out, facts["folders"])
    (several, *_) = [row for row in rows if row["split"] == "test" and "," in row["slide"]]
    script.choose_viewed = lambda *_: several
    told = f"; a gene's r is the mean of slides {several['slide']}</h2>"
    assert told in script.show_viewer(out, facts, rows)[0]


def test_prior_methods_and_gene_sets_have_the_benchmarks_number(root, tmp_path):
    weights = weights_of(tmp_path / "weights")
    sets = tmp_path / "sets.gmt"
    sets.write_text("\t".join(["WHOLE", "-", *TASK_GENES]))
    small = {"features": SMALL, "only": f"hest probe ({SMALL}, full width)", "pretrained": weights}
    small |= {"gene_sets": sets}
    out = tmp_path / "runs"
    stdout = stdout_of("25", data_root=root, out=out, **(NETWORK | small))
    head, (line,) = printed_table(stdout, "methods")
    assert head.split()[1:3] == ["HEST", "r"]
    rows = pd.read_csv(out / "rows.csv").query("split == 'test' and truth == 'log1p'")
    np.testing.assert_allclose(rows["set_WHOLE"], rows["all_pooled"], rtol=1e-9)
    for found, expected in zip(rows["set_WHOLE_ci"], rows["all_pooled_ci"], strict=True):
        np.testing.assert_allclose(json.loads(found), json.loads(expected), rtol=1e-5)
    _, lines = printed_table(stdout, "gene sets: ")
    number = line.split("width)")[1].split()[0]
    assert number in lines[-1]


def test_random_weights_train_and_have_no_probe(root, tmp_path):
    options = NETWORK | {"hidden": 4, "epochs": 1}
    stdout = stdout_of("20", data_root=root, out=tmp_path, **options)
    assert set(table_of(stdout)["setting"]) == {SMALL, "ridge (colour)"}


# ------------------------------------------------------------------------------------------- probe
def benchmarks_trainer(features, target, seen, full_width):
    """(prediction, alpha) by the benchmark's own steps on arrays, tensors where it makes some."""
    if not full_width:
        scaler = StandardScaler().fit(features)
        pca = PCA(n_components=min(256, *features.shape), random_state=1)
        reduced = pca.fit_transform(scaler.transform(features))
        features = torch.Tensor(reduced)
        seen = torch.Tensor(pca.transform(scaler.transform(seen)))
    alpha = 100 / (features.shape[1] * target.shape[1])
    ridge = Ridge(alpha, fit_intercept=False, solver="lsqr", max_iter=1000, random_state=1)
    ridge.fit(features, target)
    return ridge.predict(seen), alpha


@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("n_spots, width", [(500, 320), (90, 320), (500, 40)])
def test_a_probe_is_the_benchmarks_trainer_on_made_features(full_width, n_spots, width):
    random = np.random.default_rng(n_spots)
    scale = np.exp(random.normal(0, 1, width))  # Columns of one scale would not need a scaler.
    features = (random.normal(1, 1, (n_spots + 60, width)) * scale).astype(np.float32)
    weights = random.normal(0, 1, (width, 7)) / scale[:, None]
    noise = random.normal(0, 3, (n_spots + 60, 7))
    target = (features @ weights + noise).astype(np.float32)
    arrays = features[:n_spots], target[:n_spots], features[n_spots:]
    predicted, alpha = probes.probe_features(*arrays, full_width=full_width)
    expected, alpha_of_benchmark = benchmarks_trainer(*arrays, full_width)
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-8)
    assert alpha == alpha_of_benchmark
    other, _ = probes.probe_features(*arrays, full_width=not full_width)
    assert np.abs(predicted - other).max() > 0.01


@pytest.mark.parametrize("full_width", [False, True])
def test_a_probe_sees_frozen_features_of_all_training_spots(data, splits, tmp_path, full_width):
    """Features are fp32 though bf16 is asked, of the last stage though all are."""
    recipe = {"BACKBONE": SMALL, "PRETRAINED": str(weights_of(tmp_path / "weights"))}
    recipe |= {"IMAGE_SIZE": 32, "DEVICE": "cpu", "PRECISION": "fp32"}
    features, _ = encode_spots(data, recipe, 42)
    asked = recipe | {"PRECISION": "bf16", "POOL_STAGES": True}
    if full_width:
        asked["FULL_WIDTH"] = True
    for split in splits:
        train, test = probes.order_by_fold_file(split), split.roles == "test"
        arrays = features[train], data.target[train], features[test]
        expected, alpha = benchmarks_trainer(*arrays, full_width)
        row = Row("probe", asked, split, tmp_path)
        predicted = probes.hest_probe(row)
        found = predicted[split.roles[split.scored()] == "test"]
        # Some processors add the sums of a batch in an order that depends on its size.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        r, by_benchmark = (common.pearson_per_gene(x, data.target[test]) for x in (found, expected))
        np.testing.assert_allclose(r, by_benchmark, atol=1e-7)
        assert row.notes["alpha"] == alpha
        assert np.isnan(predicted[split.roles[split.scored()] == "valid"]).all(), "it knows them"


def test_the_probe_sees_spots_in_the_order_of_the_fold_file(root, data, splits):
    names = pd.read_csv(root / "slides.csv").set_index("tissue_index")["name"]
    for split, (train, _) in zip(splits, SPLITS, strict=True):
        known = probes.order_by_fold_file(split)
        assert sorted(known) == sorted(split.spots("train", "valid"))
        samples = names[data.spots["tissue_index"].to_numpy()[known]]
        assert list(dict.fromkeys(samples)) == list(train)
        for sample in train:
            assert (np.diff(known[(samples == sample).to_numpy()]) > 0).all()


# --------------------------------------------------------------------------- intervals and ceilings
def test_the_ceiling_of_raw_counts_is_the_r_of_knowing_every_intensity():
    random = np.random.default_rng(0)
    intensity = np.exp(random.normal(1, 0.7, (3000, 1)) * [1, 0.5, 1.5])
    counts = random.poisson(intensity)
    found = load_script("19").counting_ceiling(counts, np.full(3000, 1e4))
    for gene in range(3):
        r = scipy.stats.pearsonr(np.log1p(intensity[:, gene]), np.log1p(counts[:, gene]))[0]
        assert found[gene] == pytest.approx(r, abs=0.05)


def test_the_ceiling_of_a_fold_is_over_all_its_test_spots(root, data, scored):
    ceiling = load_script("19").counting_ceiling
    slides = pd.read_csv(root / "slides.csv").set_index("name")["tissue_index"]
    at = np.isin(data.spots["tissue_index"], slides[list(SPLITS[1][1])])
    counts = anndata.read_h5ad(root / "dataset" / "counts.h5ad").X[at].toarray()
    expected = ceiling(counts, np.full(at.sum(), 1e4))
    np.testing.assert_allclose(data.annotations.var["ceiling_fold_1"], expected, atol=1e-3)
    rows = table_of(scored[1]).query("split == 'test' and truth == 'log1p' and fold == 1")
    assert rows["all_ceiling"].iloc[0] == pytest.approx(np.nanmean(expected), abs=1e-3)


# ---------------------------------------------------------------------------------------- refusals
def without_a_gene(task):
    path = task / "adata" / "NCBI2.h5ad"
    table = anndata.read_h5ad(path)
    table[:, [gene for gene in GENES if gene != TASK_GENES[0]]].copy().write_h5ad(path)


def with_a_barcode_too_many(task):
    path = task / "adata" / "NCBI2.h5ad"
    anndata.read_h5ad(path)[1:].copy().write_h5ad(path)


def without(name):
    return lambda task: (task / name).unlink()


def written(name, text):
    return lambda task: (task / name).write_text(text)


@pytest.mark.parametrize("change, options, words", [
    (without("splits/test_1.csv"), {}, ["test_1.csv", "no such file"]),
    (lambda task: write_split(task, "test", 0, ["MEND3", "TENX1"]), {}, ["TENX1", "train_0.csv", "test_0.csv"]),
    (written("splits/train_0.csv", "sample,patches\nTENX1,TENX1.h5\n"), {}, ["train_0.csv", "sample_id, patches_path, expr_path"]),
    (without_a_gene, {}, ["NCBI2", TASK_GENES[0], "1 of the 6 genes"]),
    (written("var_50genes.json", "[]"), {}, ["var_50genes.json", "no list of genes"]),
    (without("patches/MEND3.h5"), {}, ["MEND3.h5", "no such file"]),
    (with_a_barcode_too_many, {}, ["NCBI2.h5", "no barcode"]),
    (lambda task: None, {"samples": "TENX1"}, ["--samples", "splits/"]),
    (lambda task: None, {"panel": "genes.csv"}, ["--panel genes.csv", "leave it out"]),
])  # fmt: skip
def test_a_task_in_doubt_is_refused(tmp_path, change, options, words):
    task = make_task(tmp_path / "IDC")
    change(task)
    root = tmp_path / "mine"
    expect_refusal(words, "19", data_root=root, from_hest=task, **options)
    assert not (root / "dataset").exists()
    if change is with_a_barcode_too_many:
        assert not (root / "links").exists()


@pytest.mark.parametrize("options", [{}, {"samples": "TENX1"}, {"organ": "Breast"}])
def test_the_folder_above_tasks_names_them(tmp_path, options):
    for name in ("PRAD", "IDC"):
        write_split(tmp_path / "tasks" / name, "train", 0, SAMPLES[:2])
    words = ["2 tasks", "IDC, PRAD", f"--from-hest {tmp_path / 'tasks' / 'IDC'}"]
    options |= {"from_hest": tmp_path / "tasks", "data_root": tmp_path / "mine"}
    expect_refusal(words, "19", **options)


@pytest.mark.parametrize("script, slides, options, words", [
    ("19", "simulated", {"target": "log1p"}, ["--target log1p", "--target lognorm"]),
    ("20", "simulated", TINY | HEST | {"target": "lognorm"}, ["--protocol hest", "--target log1p"]),
    ("20", "simulated", TINY | HEST | {"target": "harmony"}, ["--protocol hest", "--target log1p"]),
    ("20", "simulated", TINY | HEST | {"protocol": "paper"}, ["--target log1p", "--protocol hest"]),
    ("20", "simulated", TINY | HEST | {"protocol": "loso"}, ["--target log1p", "--target lognorm"]),
    ("20", "simulated", TINY | HEST, ["no task of HEST-Benchmark", "--from-hest"]),
    ("20", "root", TINY, ["task of HEST-Benchmark", "--protocol hest --target log1p"]),
    ("22", "root", {"protocol": "hest"}, ["--protocol hest", "paper, loso, block"]),
])  # fmt: skip
def test_other_data_and_targets_are_refused(request, tmp_path, script, slides, options, words):
    out = {} if script == "19" else {"out": tmp_path}
    data_root = request.getfixturevalue(slides)
    expect_refusal(words, script, data_root=data_root, **out, **options)
