# ruff: noqa: E501 (lines of the product, next to what becomes of them)
"""The guards of the product, each with the change that removes it and the tests that must notice.

Snippets are short and occur exactly once in their file; tests/mutants/test_guards.py checks that. A guard
that no test can see has a reason, which the table prints.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`file`: its `snippet` becomes `replacement`, and one of `tests` (arguments of pytest) must fail."""

    file: str
    snippet: str
    replacement: str
    tests: tuple[str, ...]
    survives_because: str = ""


def of(file: str, tests: str, *changes: tuple[str, ...]) -> list[Mutant]:
    """The mutants of one file that the same tests must kill, or that survive for a reason."""
    return [Mutant(file, one[0], one[1], tuple(tests.split()), *one[2:]) for one in changes]


MUTANTS: list[Mutant] = [
    *of(
        "pipeline/storage/uri_rules.py",
        "tests/pipeline/storage/test_uri_rules.py",
        ('if "\\x00" in uri:', "if False:"),
        ("elif scheme not in access.schemes:", "elif False:"),
        ('if "@" in head and (":" in head or scheme.startswith("http")):', "if False:"),
        ("if not head or not path:", "if False:"),
        ('if any(part in (".", "..") for part in path.split("/")):', "if False:"),
        ('if _is_signed(f"{scheme}://{rest}"):', "if False:"),
        ('if int(match["port"] or 80) > 65535:', "if False:"),
        ('if host.rstrip(".").lower() in _METADATA_NAMES:', "if False:"),
        ("    if address is not None:\n        check_address(address)", "    if False:\n        check_address(address)"),
    ),
    *of(
        "pipeline/storage/checksummed_parquet.py",
        "tests/mutants/test_page_checksums.py tests/pipeline/tables/test_unit_files.py",
        ("page_checksum_verification=True", "page_checksum_verification=False"),
        ("write_page_checksum=True", "write_page_checksum=False"),
        ('if digest.hexdigest().encode("ascii") == match.group(1):', "if True:"),
        ("    check_seal(body, name)\n    with", "    with"),
        ("if not any(file.schema_arrow.equals(one, check_metadata=False)", "if False and not any(file.schema_arrow.equals(one)"),
    ),
    *of(
        "pipeline/inputs/hf_parquet.py",
        "tests/mutants/test_page_checksums.py",
        (", page_checksum_verification=True", ""),
    ),
    *of(
        "pipeline/inputs/read_table.py",
        "tests/mutants/test_page_checksums.py",
        (", page_checksum_verification=True", ""),
    ),
    *of(
        "pipeline/job_state/plan_files.py",
        "tests/pipeline/planning/test_make_plan.py::test_damage_in_a_plan_file_is_found",
        ('if pc.unique(rows.column("unit_id")).to_pylist() != [unit_id]:', "if False:"),
        ("if group >= file.num_row_groups:", "if False:"),
        ("if entry.key != plan_key(plan_sha256, index):", "if False:"),
    ),
    *of(
        "pipeline/job_state/driver_lock.py",
        "tests/pipeline/job_state/test_driver_lock.py tests/pipeline/job_state/test_job_file.py",
        ("    if latest > number:\n", "    if False:\n"),
        ("        if beat != first:\n", "        if False:\n"),
        ('return state in ("Z", "X") or started not in ("", self.started)', "return False"),
        ("        except ProcessLookupError:\n            return True", "        except ProcessLookupError:\n            return False"),
        ("if place != (here.boot, here.pids, here.host)", "if False"),
    ),
    *of(
        "pipeline/job_state/job_file.py",
        "tests/pipeline/job_state/test_job_file.py",
        ("if json.dumps(before.get(name, ABSENT)) != json.dumps(after.get(name, ABSENT))", "if before.get(name, ABSENT) != after.get(name, ABSENT)"),
        ("    if foreign and store.head(JOB_KEY) is None:", "    if False:"),
        ('if content["product"] != "hqlabel":', "if False:"),
        ('if content["format"] > JOB_FORMAT:', "if False:"),
        ('if type(plan[name]) is not int or plan[name] < 0:', "if False:"),
        ('if stored["units_per_part"] < 1:', "if False:"),
        ("or not _PLAIN.fullmatch(context.plan_sha256) or not 1 <=", "or not 1 <="),
    ),
    *of(
        "pipeline/storage/local_disk.py",
        "tests/pipeline/storage/test_output_store.py -k local",
        ("                os.link(temporary, path)\n", "                os.replace(temporary, path)\n"),
        ("            os.fsync(descriptor)\n", "            pass\n"),
        ("    _sync_folder(folder)\n\n    def", "    pass\n\n    def"),
        ("if not os.path.samestat(held, now) or", "if", "two versions have one tag only if of one size and written in one tick of the disk's clock"),
    ),
    *of(
        "pipeline/storage/output_store.py",
        "tests/pipeline/storage/test_output_store.py::test_a_key_that_could_leave_the_place_is_a_bug "
        "tests/pipeline/storage/test_output_store.py::test_a_created_object_reads_back_and_is_never_replaced_by_a_second_create",
        ('if key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):', "if False:"),
        (
            "except FileExistsError:\n                return self._backend.get(path, max_bytes=None, timeout_s=left).data == data",
            "except FileExistsError:\n                return True",
        ),
    ),
    *of(
        "pipeline/images/decode_upright.py",
        "tests/pipeline/images/test_decode_upright.py",
        ("    if picture.width * picture.height > max_pixels:", "    if False:", "Pillow's own limit is set to the same number, and is refused next with the same code"),
        ("    picture.verify()\n", "    pass\n"),
        ("    if picture.mode not in _TO_RGB_MODES:", "    if False:"),
    ),
    *of(
        "pipeline/tables/unit_checks.py",
        "tests/pipeline/tables/test_unit_files.py",
        ("    if table.num_rows != planned.num_rows:", "    if False:"),
        ("        if count != plan:", "        if False:"),
        ("for one, plan in pairs if one != plan]", "for one, plan in pairs if False]"),
        ("        if not field.nullable and array.null_count:", "        if False:"),
        ("            if bad:\n", "            if False:\n"),
        ("    if status not in schema.STATUSES:", "    if False:"),
        ('    if (status == "failed") != (code is not None):', "    if False:"),
        ('    if (status == "labelled") != (masks > 0):', "    if False:"),
        ("    if code is not None and code not in IMAGE_CODES:", "    if False:"),
    ),
    *of(
        "pipeline/stages/box_prompts.py",
        "tests/pipeline/stages/test_box_prompts.py tests/pipeline/stages/test_prompts_in_job.py",
        ("    if turn not in range(1, 9):", "    if False:"),
        ("    if stored_size_hw is not None and stored_size_hw != stored:", "    if False:"),
        ("    if len(labels) > MOST_POINTS:", "    if False:"),
        ("    if not all(label in (1, 0, -1) for label in labels):", "    if False:"),
        ("    if not fits or not np.asarray(inside)[is_point].all():", "    if not fits:"),
    ),
    *of(
        "pipeline/stages/crash_log.py",
        "tests/pipeline/stages/test_crash_log.py",
        ("if deaths >= MAX_DEATHS_IN_LOADING:", "if False:"),
        ("DEATHS_UNDER_ONE_DRIVER = 2", "DEATHS_UNDER_ONE_DRIVER = 3"),
        ("DEATHS_UNDER_ANY_DRIVER = 4", "DEATHS_UNDER_ANY_DRIVER = 5"),
        ("MAX_UNEXPLAINED_DEATHS = 5", "MAX_UNEXPLAINED_DEATHS = 500"),
    ),
    *of(
        "pipeline/worker/process_env.py",
        "tests/pipeline/worker/test_process_env.py",
        ("    found = loosening_in(environ, REFUSED)\n    if found:", "    found = loosening_in(environ, REFUSED)\n    if False:"),
        ("    found = loosening_in(os.environ)\n    if found:", "    found = loosening_in(os.environ)\n    if False:"),
        ('"HQLABEL_FAILPOINT": "ends', '"HQLABEL_OTHER": "ends'),
    ),
    *of(
        "model/rle.py",
        "tests/model/test_rle.py",
        ('(codes < 0) | (codes > 63)', "(codes < 0) & False"),
        ('_add(faults, ends_open,', "_add(faults, ends_open & False,"),
        ("place >= most[mask]", "(place >= most[mask]) & False"),
        ("np.flatnonzero(shortest < 0)", "np.flatnonzero((shortest < 0) & False)"),
        ("(totals != pixels[masks]) & (shortest >= 0)", "(totals != pixels[masks]) & False"),
        ("if min(size) < 1 or size[0] * size[1] >= SHORT_PIXELS:", "if min(size) < 1:"),
        ("if type(run) is not int or not 0 <= run < SHORT_PIXELS:", "if False:"),
    ),
    *of(
        "model/checkpoints.py",
        "tests/model/test_checkpoints.py tests/model/test_checkpoints_of_others.py",
        ("if tensor.layout != torch.strided or tensor.is_meta:", "if False:"),
        ("if not bool(torch.isfinite(tensor).all()):", "if False:"),
        ("if tensor.dtype not in STORED_DTYPES:", "if False:"),
        ('if not isinstance(shard, str) or not re.fullmatch(r"[\\w-][\\w.-]*", shard):', "if False:"),
        ('map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'),
    ),
    *of(
        "jobs/load_config.py",
        "tests/jobs/test_load_config.py",
        ("    if len(text) > MOST_CHARS:", "    if False:"),
        ("    if _brackets_deep(text) > MOST_DEEP:", "    if False:"),
        ("            if key in seen:\n", "            if False:\n"),
        ("if node is not None and _size(node, {}) > MOST_VALUES:", "if False:"),
        ("        if not isinstance(inner, dict):", "        if False:"),
        ("return masked(repr(value)[:200])", "return repr(value)[:200]"),
    ),
    *of(
        "jobs/cluster/ray_watch.py",
        "tests/jobs/cluster/test_ray_deaths.py",
        ("            if code is not None:\n", "            if False:\n"),
        ("        if outage_s < self._patience_s:", "        if True:"),
        ("        if not _takes_connections(node.raylet_socket_name):", "        if False:"),
        ("                self._thread.join(_CONFIRM_S)\n", "                pass\n"),
        ("            if what and not self._closed.is_set():", "            if what and False:"),
    ),
    *of(
        "jobs/cluster/end_session.py",
        "tests/jobs/cluster/test_ray_deaths.py",
        ("os.kill(pid, signal.SIGKILL)", "os.kill(pid, 0)"),
        (" and os.lstat(link).st_mode & stat.S_IWUSR", ""),
        ("    shutil.rmtree(folder, ignore_errors=True)\n", "    pass\n"),
    ),
    *of(
        "jobs/terminal/signals.py",
        "tests/jobs/terminal/test_signals.py",
        ("    os._exit(code)", "    os._exit(0)"),
        ('        self._ending.acquire()', "        pass"),
    ),
    *of(
        "jobs/export/yolo.py",
        "tests/jobs/export/test_hostile_names.py tests/jobs/export/test_export.py",
        ('line.splitlines() == [line] and ', ""),
        ("        if not place.put_if_absent(key, \"\".join(text).encode()):", "        place.put(key, \"\".join(text).encode())\n        if False:"),
    ),
    *of(
        "jobs/export/webdataset_shards.py",
        "tests/jobs/export/test_tools_formats.py",
        ('return ending if ending in _PICTURES else "img"', "return ending"),
    ),
    *of(
        "jobs/export/export_names.py",
        "tests/jobs/export/test_hostile_names.py tests/jobs/export/test_export.py",
        ('"\\0" not in path and not {"", ".", ".."} & set(parts)', '"\\0" not in path'),
        ("        if other is not None:", "        if False:"),
    ),
    *of(
        "jobs/results/render_images.py",
        "tests/jobs/export/test_hostile_names.py",
        ("for row in drawn_rows(rows))", "for row in rows.instances)"),
    ),
    # Tried later: what an outsider would break next.
    *of(
        "jobs/commands/retry.py",
        "collect tests/jobs/commands/test_retry_settings.py",
        ("    refuse_lost_rights(saved.store, saved.job, targets, options.codes)\n", ""),
    ),
    *of(
        "jobs/commands/retry.py",
        "tests/jobs/commands/test_retry_settings.py",
        ("    for one in changed:\n        console.say(f\"limits.", "    for one in ():\n        console.say(f\"limits."),
        ("    if weights.sha256 != context.weights.sha256:", "    if False:"),
        ("    if found != began_with:", "    if False:"),
        ("if manifest is not None and manifest.cleaned:", "if False:"),
        ("if code not in IMAGE_CODES:", "if False:"),
        ("        lock.take()  # first", "        # first"),
        ("if context.detector is not None and config.detector.name is None:", "if False:"),
    ),
    *of(
        "jobs/commands/retry.py",
        "tests/jobs/results/test_outputs.py",
        ("    if len(committed) < job.units:", "    if False:"),
        ("if any(committed[unit_id].generation != part.generation_of(unit_id) for unit_id in ids):", "if False:"),
    ),
    *of(
        "pipeline/storage/cloud_buckets.py",
        "tests/pipeline/storage/test_cloud_buckets.py",
        (", IfNoneMatch=\"*\")", ")"),
        ("if len(data) > stop - start:", "if False:"),
        ("    if len(data) > _ONE_PUT:", "    if False:"),
        ("            for error in reply.get(\"Errors\", [])[:1]:", "            for error in []:"),
    ),
    *of(
        "pipeline/storage/http_backend.py",
        "tests/pipeline/storage/test_bounds.py",
        ("if response.headers.get(\"Content-Encoding\", \"identity\").lower() != \"identity\":", "if False:"),
        ("headers[\"If-Match\"] = f'\"{version}\"'", "pass"),
    ),
    *of(
        "pipeline/storage/http_backend.py",
        "tests/pipeline/storage/test_web_addresses.py",
        ("if at.scheme == \"https\" and there.scheme != \"https\":", "if False:"),
        ("given = self._headers if at.origin() == first else {}", "given = self._headers"),
        ("    check_address(str(place[0]))\n", ""),
        ("    check_web_place(there.scheme, there.raw_authority)\n", ""),
        ("            check_version(_tag(response, size), version)\n", ""),
        ("allow_redirects=False", "allow_redirects=True"),
    ),
    *of(
        "pipeline/tables/changed_inputs.py",
        "tests/pipeline/tables/test_changed_inputs.py",
        ("GAP = 2", "GAP = 1"),
        ("    store.put_if_absent(f\"{archive}/{JOB_KEY}\", store.read(JOB_KEY))\n", ""),
        ("write_manifest(store, _of_no_part(found.manifest, job), found.entry)", "pass"),
    ),
    *of(
        "pipeline/tables/manifest.py",
        "tests/pipeline/tables/test_manifest.py",
        ("if there is None or there.data != body:", "if there is None:"),
        ("if store.put_if_unchanged(MANIFEST_KEY, body, seen) else None", "if store.put(MANIFEST_KEY, body) is None else None"),
        ("if content[\"format\"] != MANIFEST_FORMAT:", "if False:"),
        ("if not 0 <= manifest.units <= MOST_UNITS:", "if False:"),
        ("if not end <= part.first_unit <= part.stop_unit <= manifest.units:", "if False:"),
        ("if manifest.state == \"complete\" and manifest.published_units != manifest.units:", "if False:"),
        ("if len(name) > MOST_NAME_CHARS or not name.isprintable():", "if False:"),
        ("if not 0 <= value < MOST_COUNT:", "if False:"),
        ("store.fetch(MANIFEST_KEY, most=MOST_BYTES)", "store.fetch(MANIFEST_KEY)"),
    ),
    *of(
        "pipeline/tables/publish_tables.py",
        "tests/pipeline/tables/test_publish_tables.py",
        ("if before is not None and before.plan_sha256 != job.context.plan_sha256:", "if before is not None and False:"),
        ("    _refuse_foreign_parts(store, job)\n    held", "    held"),
        ("if unit.generation > part.generation_of(unit.unit_id))", "if False)"),
        ("    if not marked:\n", "    if False:\n"),
        ("image_id.encode() <= last_id:", "image_id.encode() < last_id:"),
        ("                if wrong:\n", "                if False:\n"),
        ("        require_latest(store, driver, \"publish\")\n        visit(\"publish.putting\")", "        visit(\"publish.putting\")"),
        ("        if store.put_if_unchanged(key, body, seen):", "        store.put(key, body)\n        if True:"),
        ("    require_owner(\"publish\")  # so `driver`", "    pass  # so `driver`"),
        ("    save_filters()\n    visit", "    visit"),
        ("    require_owner(\"publish\")\n    _write_categories", "    _write_categories"),
        ("        entry = write_manifest(store, dataclasses.replace(begun, state=\"publishing\"), entry)\n", "        pass\n"),
    ),
    *of(
        "pipeline/tables/publish_tables.py",
        "tests/pipeline/tables/test_published_parts.py",
        ("before is None or look.due or before.state == \"publishing\":", "before is None or look.due:", "a publish would write another state, so the comparison of the whole manifest that follows differs"),
        ("revision=max(before.revision if before is not None else 0, published),", "revision=before.revision if before is not None else 0,"),
        ("older = part and wanted and any(", "older = False and any("),
    ),
    *of(
        "pipeline/tables/clean_output.py",
        "tests/pipeline/tables/test_published_parts.py",
        ("    visit(\"clean.listed\")\n    require_owner(\"clean\")\n", "    visit(\"clean.listed\")\n"),
        ("    visit(\"clean.marked\")\n    require_owner(\"clean\")\n", "    visit(\"clean.marked\")\n"),
        ("if unit.generation > published.get(unit.unit_id, -1):", "if False:"),
        ("if said is not None and dict(said.generations) != dict(part.generations):", "if False:"),
    ),
    *of(
        "pipeline/tables/clean_output.py",
        "tests/pipeline/tables/test_publish_tables.py",
        ("if hashlib.sha256(body).hexdigest() != file.sha256:", "if False:"),
        ("if found.manifest is None or found.manifest.state != \"complete\":", "if found.manifest is None:"),
    ),
    *of(
        "pipeline/tables/published_parts.py",
        "tests/pipeline/tables/test_published_parts.py",
        ("if stream.seek(0, 2) != file.bytes or file.seal not in (\"\", seal):", "if False:"),
        ("    if images.filters != instances.filters:", "    if False:"),
        ("if footer.get(\"plan_sha256\", job.context.plan_sha256) != job.context.plan_sha256:", "if False:"),
        ("return all(sizes.get(file.key) == file.bytes for", "return all(file.key in sizes for"),
        ("    if len(two) < len(of_both):  # the other", "    if False:  # the other"),
        ("return {unit: low for unit, (low, _) in pairs.items() if low}", "return {unit: high for unit, (_, high) in pairs.items() if high}"),
        ("if _has_sizes(part, sizes) or (both and manifest.state == \"publishing\"):", "if True:"),
        ("if generations is None or any(generations.get(u, 0) < job.context.first_generation for u in ids):", "if generations is None:"),
        ("if any((one.index, one.first_unit, one.stop_unit) != (index, ids.start, ids.stop) for one in two):", "if False:"),
        ("if any(low != high and newest.get(unit, -1) < high for", "if any(False for"),
    ),
    *of(
        "pipeline/tables/unit_files.py",
        "tests/pipeline/tables/test_unit_files.py",
        ("files = files[files[:, 1] >= first_generation]", "pass"),
        ("np.lexsort((files[:, 1], files[:, 0]))", "np.lexsort((-files[:, 1], files[:, 0]))"),
        ("    if stored != body:\n", "    if False:\n"),
        ("(unit_id, generation) if unit_key(unit_id, generation) == key else None", "(unit_id, generation)"),
        ("    if unknown:\n", "    if False:\n"),
    ),
    *of(
        "pipeline/tables/verify_output.py",
        "tests/pipeline/tables/test_publish_tables.py",
        ("if len(body) != expected.bytes:", "if False:", "the sha256 of the whole file, compared next, differs too"),
        ("if hashlib.sha256(body).hexdigest() != expected.sha256:", "if False:"),
    ),
    *of(
        "pipeline/tables/verify_output.py",
        "tests/pipeline/tables/test_verify_output.py",
        ("if newest.generation > published.get(unit_id, newest.generation):", "if False:"),
        ("if last is not None and key <= last:", "if last is not None and key < last:"),
        ("    if accepted != part.counts.accepted:", "    if False:"),
    ),
]  # fmt: skip
