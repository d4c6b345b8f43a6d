"""Which tests cover which row of the hazard catalogue on files, headers, geometry and labels, and which rows wait."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

NIFTI, ITK, RASTER = "io/test_nifti.py", "io/test_itk.py", "io/test_raster.py"
FILES, SERIES, LABELS = "hazards/test_files.py", "hazards/test_series.py", "hazards/test_labels.py"
SAFE, MATRIX = "hazards/test_security_and_privacy.py", "hazards/test_world_matrix.py"
HEADER, ELEMENTS, PIXELS = "io/dicom/test_header.py", "io/dicom/test_elements.py", "io/dicom/test_pixels.py"
READER, ASSEMBLE, RESCALE = "io/dicom/test_reader.py", "io/dicom/test_assemble.py", "io/dicom/test_rescale.py"
FUZZ, CODECS, SCAN = "io/test_fuzz_readers.py", "test_codecs.py", "data/test_scan.py"
SCAN_DICOM, ARCHIVE, COHORT = "data/test_scan_dicom.py", "data/test_archive.py", "data/test_cohort.py"
FAULTY = "io/dicom/test_faulty_series.py::test_series_comes_to_its_required_outcome"
FAULTY_READ = f"{SERIES}::test_every_faulty_series_ends_for_its_reader_as_required"
BAD_NIFTI = f"{NIFTI}::test_an_impossible_header_is_refused_with_its_code"
BAD_META = f"{ITK}::test_an_impossible_metaimage_is_refused_with_its_code"
BAD_NRRD = f"{ITK}::test_an_impossible_nrrd_is_refused_with_its_code"
BAD_DICOM = f"{HEADER}::test_headers_that_cannot_be_true_are_refused"
FUZZED = f"{FUZZ}::test_mutated_files_give_a_volume_or_our_own_error"

ROWS: dict[str, tuple[str, ...]] = {
    # B.1 NIfTI
    "N01": (f"{NIFTI}::test_a_cut_gzip_file_is_refused_wherever_it_is_cut",),
    "N02": (f"{NIFTI}::test_a_flipped_bit_never_changes_a_voxel_in_silence",),
    "N03": (f"{NIFTI}::test_a_cut_gzip_file_is_refused_wherever_it_is_cut",),
    "N04": (f"{NIFTI}::test_a_wrong_checksum_or_length_is_seen",),
    "N05": (f"{NIFTI}::test_bytes_behind_the_end_are_refused_unless_zero",),
    "N06": (f"{NIFTI}::test_the_first_bytes_decide_and_a_wrong_name_is_said",),
    "N07": (f"{NIFTI}::test_the_first_bytes_decide_and_a_wrong_name_is_said",),
    "N08": (f"{NIFTI}::test_a_cut_plain_file_is_refused",),
    "N10": (
        f"{FILES}::test_n10_what_is_no_regular_file_is_refused_without_waiting",
        f"{FILES}::test_n10_a_file_of_another_owner_is_named",
        f"{NIFTI}::test_faults_of_the_disk_are_told_apart",
    ),
    "N11": (
        f"{NIFTI}::test_a_header_that_promises_too_much_takes_no_memory",
        f"{FILES}::test_m12_a_bomb_stops_at_the_size_that_the_header_declares",
    ),
    "N12": (BAD_NIFTI,),
    "N13": (BAD_NIFTI,),
    "N14": (BAD_NIFTI, f"{NIFTI}::test_a_negative_pixdim_is_taken_as_positive_and_said"),
    "N15": (
        f"{NIFTI}::test_scaling_follows_one_rule",
        f"{FILES}::test_n15_a_slope_that_is_none_scales_nothing_and_is_said",
    ),
    "N16": (BAD_NIFTI,),
    "N17": (
        f"{NIFTI}::test_disagreeing_transforms_are_resolved_only_on_demand",
        f"{FILES}::test_n17_the_rounding_of_a_quaternion_is_no_conflict",
    ),
    "N18": (BAD_NIFTI,),
    "N19": (
        f"{NIFTI}::test_a_file_without_transform_is_read_with_a_warning",
        f"{NIFTI}::test_like_keeps_byte_order_units_and_a_source_without_transform",
    ),
    "N20": (f"{NIFTI}::test_shear_is_kept", f"{NIFTI}::test_every_format_gives_the_same_world"),
    "N21": (f"{NIFTI}::test_metres_and_micrometres_become_mm",),
    "N22": (
        BAD_NIFTI,
        f"{NIFTI}::test_trailing_ones_and_missing_dimensions_become_three",
        f"{NIFTI}::test_one_volume_of_a_series_is_taken_by_its_number",
    ),
    "N23": (
        f"{FILES}::test_n23_types_that_are_no_real_numbers_are_refused",
        f"{NIFTI}::test_colour_becomes_channels_and_grey_colour_one",
        f"{NIFTI}::test_alpha_is_laid_on_black",
        f"{NIFTI}::test_wide_types_are_narrowed_without_loss_or_refused",
    ),
    "N24": (f"{NIFTI}::test_a_big_endian_twin_is_bit_equal",),
    "N25": (
        f"{NIFTI}::test_a_broken_extension_is_refused",
        f"{NIFTI}::test_a_good_extension_is_passed_over_and_never_copied",
        f"{FILES}::test_n25_n26_what_a_header_says_beside_the_grid_is_dropped",
    ),
    "N26": (
        f"{NIFTI}::test_a_pair_is_read_by_either_name_and_its_digest_covers_both",
        f"{NIFTI}::test_an_analyze_file_is_refused",
        BAD_NIFTI,
    ),
    "N27": (
        f"{FILES}::test_n27_voxels_that_are_no_numbers_are_counted_or_refused",
        f"{NIFTI}::test_nonfinite_voxels_are_counted_and_filled_or_refused",
    ),
    "N28": (
        f"{SCAN}::test_bad_files_are_named_and_the_others_go_on",
        "data/test_prepare.py::test_a_constant_image_becomes_zero_and_is_named",
        "test_recipe_rules.py::test_constant_images_are_left_out_and_counted",
    ),
    "N29": (
        f"{NIFTI}::test_scaling_beyond_float32_is_refused",
        f"{NIFTI}::test_wide_types_are_narrowed_without_loss_or_refused",
        f"{NIFTI}::test_a_label_that_is_no_label_is_refused",
    ),
    # B.2 MetaImage, NRRD
    "M01": (
        f"{FILES}::test_m01_m02_a_header_reads_no_file_outside_its_folder",
        f"{ITK}::test_a_link_out_of_the_folder_is_not_followed",
    ),
    "M02": (
        f"{FILES}::test_m01_m02_a_header_reads_no_file_outside_its_folder",
        f"{ITK}::test_a_link_out_of_the_folder_is_not_followed",
    ),
    "M03": (f"{ITK}::test_a_flipped_bit_in_compressed_voxels_never_passes_in_silence",),
    "M04": (f"{ITK}::test_cut_files_are_refused_with_the_true_reason", BAD_META),
    "M05": (f"{ITK}::test_mutated_files_end_in_one_error_type", FUZZED),
    "M06": (
        f"{ITK}::test_what_a_header_leaves_out_is_assumed_aloud",
        "evaluation/test_predict.py::test_an_mha_without_spacing_needs_one_said",
    ),
    "M07": (BAD_META,),
    "M08": (
        f"{ITK}::test_byte_orders_text_and_gzip_hold_the_same_voxels",
        f"{ITK}::test_files_of_simpleitk_are_read_as_simpleitk_does",
    ),
    "M09": (f"{ITK}::test_a_flipped_bit_in_compressed_voxels_never_passes_in_silence",),
    "M10": (
        f"{ITK}::test_the_space_of_an_nrrd_decides_the_signs",
        f"{ITK}::test_what_a_header_leaves_out_is_assumed_aloud",
        BAD_NRRD,
    ),
    "M11": (f"{ITK}::test_a_list_axis_at_either_end_becomes_the_channels", BAD_NRRD),
    "M12": (f"{FILES}::test_m12_a_bomb_stops_at_the_size_that_the_header_declares", BAD_NRRD),
    "M13": (f"{ITK}::test_mutated_files_end_in_one_error_type", FUZZED),
    # B.3 DICOM files
    "D01": (f"{FILES}::test_d01_a_slice_that_was_cut_refuses_the_series_by_its_name",),
    "D02": (f"{FILES}::test_d02_more_pixels_than_the_header_says_are_refused_but_for_a_pad_byte",),
    "D03": (
        f"{FILES}::test_d03_a_slice_without_preamble_and_meta_is_one_of_its_series",
        f"{FILES}::test_d03_shipped_files_without_meta_information_are_known",
    ),
    "D04": (
        f"{FILES}::test_d04_what_lies_beside_the_slices_is_ignored_with_its_reason",
        f"{SCAN_DICOM}::test_labels_that_nothing_or_two_belong_to_are_refused",
    ),
    "D05": (
        f"{CODECS}::test_damaged_data_are_refused_by_name",
        f"{CODECS}::test_a_crash_costs_its_own_file_and_names_it",
        FUZZED,
    ),
    "D06": (
        f"{READER}::test_a_codestream_with_another_sign_is_named",
        f"{PIXELS}::test_the_shipped_file_with_a_wrong_sign_reads_as_pydicom_reads_it",
    ),
    "D07": (f"{FILES}::test_d07_a_syntax_without_decoder_is_found_by_the_scan_and_named",),
    "D08": (f"{FILES}::test_d08_projections_are_turned_and_quantities_are_not",),
    "D09": (f"{FILES}::test_d09_each_slice_has_its_own_slope_and_none_is_rounded", f"{FAULTY}[rescale slope 0]"),
    "D10": (f"{READER}::TestUnits::test_that_are_signed_and_labelled_unsigned_are_mended_on_demand",),
    "D11": (f"{FILES}::test_d11_padding_becomes_air", f"{RESCALE}::test_padding_that_may_be_tissue_is_left"),
    "D12": (
        f"{FILES}::test_d12_overlay_bits_above_twelve_do_not_count",
        f"{PIXELS}::test_bits_above_the_stored_ones_do_not_count",
    ),
    "D13": (
        f"{FILES}::test_d13_a_photometric_that_is_no_colour_of_ours_is_named",
        f"{PIXELS}::test_ybr_becomes_rgb_as_pydicom_converts_it",
        f"{PIXELS}::test_palettes_give_the_colours_that_pydicom_finds",
    ),
    "D14": (
        f"{HEADER}::test_enhanced_frames_follow_their_functional_groups",
        f"{FAULTY}[enhanced in odd order]",
        f"{FAULTY}[enhanced with a frame missing]",
        f"{MATRIX}::test_the_same_phantom_in_all_formats_has_the_same_world",
    ),
    "D15": (
        f"{FILES}::test_d15_a_clip_is_no_volume_and_offers_its_frames",
        f"{HEADER}::test_mosaic_tiles_lie_where_the_protocol_counts_them",
        f"{SCAN_DICOM}::test_a_clip_gives_its_middle_frame",
    ),
    "D16": (f"{FILES}::test_d16_sequences_nested_too_deep_are_refused",),
    "D17": (f"{FILES}::test_d17_a_deflated_bomb_is_refused_before_it_fills_memory",),
    "D18": (
        f"{CODECS}::test_a_decoder_that_hangs_is_ended",
        f"{CODECS}::test_the_child_may_not_take_more_than_2_gib",
    ),
    "D19": (f"{FILES}::test_d19_a_size_that_the_file_cannot_hold_takes_no_memory",),
    "D20": (f"{FAULTY}[numbers longer than 16 characters]", f"{FAULTY_READ}[numbers longer than 16 characters]"),
    "D21": (
        f"{FAULTY}[decimal comma]",
        f"{FAULTY}[slice thickness is empty]",
        f"{FAULTY}[position not a number]",
        f"{FAULTY}[position that overflows]",
        BAD_DICOM,
    ),
    "D22": (f"{FILES}::test_d22_an_unknown_character_set_and_broken_names_change_nothing",),
    "D23": (f"{FILES}::test_d23_an_identifier_never_becomes_a_path",),
    "D24": (f"{FILES}::test_d24_the_index_of_a_disc_is_not_followed",),
    "D25": (
        f"{FAULTY}[file copied]",
        f"{FAULTY}[instance with two contents]",
        f"{READER}::test_a_copied_file_is_left_out_with_a_warning",
    ),
    "D26": (f"{FILES}::test_d26_a_program_in_the_preamble_is_said",),
    "D27": (
        f"{FILES}::test_d27_shipped_twins_are_bit_equal",
        f"{READER}::test_every_lossless_syntax_gives_the_same_volume",
    ),
    "D28": (
        f"{FILES}::test_d28_every_shipped_odd_file_is_read_or_refused_by_name",
        f"{ELEMENTS}::test_broken_files_are_refused",
    ),
    "D29": (f"{FAULTY}[screen save in the series]", f"{READER}::test_a_screen_save_is_left_out_with_a_warning"),
    "D30": (f"{SCAN_DICOM}::test_text_in_the_picture_is_refused_or_accepted_without_a_thumbnail",),
    # B.4 series
    "G01": (
        f"{FAULTY_READ}[one slice missing]",
        f"{ASSEMBLE}::test_missing_slice_names_its_place",
        f"{READER}::test_gaps_are_filled_on_demand_only",
        f"{SERIES}::test_g01_g03_g21_the_doctor_and_the_scan_refuse_as_the_reader_does",
    ),
    "G02": (f"{FAULTY_READ}[place taken twice]", f"{FAULTY_READ}[slice copied]"),
    "G03": (
        f"{FAULTY_READ}[distances of 2 and 5 mm]",
        f"{SERIES}::test_g01_g03_regularising_keeps_every_slice_at_its_true_place",
    ),
    "G04": (
        f"{FAULTY_READ}[tilted gantry]",
        f"{SERIES}::test_g04_a_tilted_ball_is_round_and_in_its_place",
        "data/test_prepare.py::test_a_sheared_grid_gets_right_angles_and_a_warning_with_the_angle",
    ),
    "G05": (
        f"{SERIES}::test_g05_oblique_from_1_to_89_degrees_about_each_axis",
        f"{MATRIX}::test_the_same_phantom_in_all_formats_has_the_same_world",
    ),
    "G06": (
        f"{FAULTY_READ}[sagittal]",
        f"{FAULTY_READ}[coronal]",
        f"{FAULTY_READ}[both directions reversed]",
        f"{FAULTY_READ}[slices from head to feet]",
    ),
    "G07": (f"{FAULTY_READ}[lone localizer]", f"{FAULTY_READ}[localizer of three slices]"),
    "G08": (
        f"{FAULTY_READ}[two series in one folder]",
        f"{SERIES}::test_g08_two_series_of_a_folder_are_two_cases_and_never_one_volume",
        "evaluation/test_inputs.py::test_dicom_files_become_one_job_a_volume_named_by_their_series",
    ),
    "G09": (
        f"{FAULTY_READ}[two echoes]",
        f"{FAULTY_READ}[four diffusion directions]",
        f"{FAULTY_READ}[three time points]",
        f"{FAULTY_READ}[volumes that nothing tells apart]",
        f"{ASSEMBLE}::test_ambiguous_stack_lists_the_traits",
    ),
    "G10": (
        f"{FAULTY_READ}[instance numbers reversed]",
        f"{FAULTY_READ}[instance numbers equal]",
        f"{FAULTY_READ}[instance numbers missing]",
    ),
    "G11": (f"{FAULTY_READ}[one slice of other spacing]",),
    "G12": (f"{FAULTY_READ}[one slice of other rows]",),
    "G13": (f"{FAULTY_READ}[directions of length 2]", f"{FAULTY_READ}[directions rounded]"),
    "G14": (
        f"{FAULTY_READ}[directions of length 0]",
        f"{FAULTY_READ}[directions parallel]",
        f"{FAULTY_READ}[directions not at right angles]",
    ),
    "G15": (
        f"{FAULTY_READ}[radiographs of one series]",
        f"{FAULTY_READ}[CT images without position]",
        f"{FAULTY_READ}[no position anywhere]",
    ),
    "G16": (f"{FAULTY_READ}[sound]", f"{FAULTY_READ}[spacing swapped in one slice]"),
    "G17": (f"{FAULTY_READ}[two frames of reference]",),
    "G18": (f"{SERIES}::test_g18_how_the_patient_lay_moves_no_voxel",),
    "G19": (f"{FAULTY_READ}[slice distance of the tag is wrong]", f"{FAULTY_READ}[slice thickness is wrong]"),
    "G20": (
        f"{FAULTY_READ}[jitter of 0.01 mm]",
        f"{FAULTY_READ}[jitter of 0.2 mm]",
        f"{FAULTY_READ}[drift of 0.6 mm in the sum]",
    ),
    "G21": (f"{FAULTY_READ}[two patients in one series]",),
    "G22": (f"{FAULTY_READ}[one slice]", f"{FAULTY_READ}[two slices]"),
    "G23": (
        f"{SERIES}::test_g23_many_slices_take_no_more_than_one_and_a_half_volumes",
        f"{SERIES}::test_g23_a_folder_of_20000_files_is_looked_through",
        f"{ASSEMBLE}::test_four_thousand_slices_take_under_a_second",
    ),
    # B.5 pictures
    "P01": (f"{FILES}::test_p01_a_picture_of_too_many_pixels_is_refused_by_its_header",),
    "P02": (f"{FILES}::test_p02_a_cut_picture_is_refused",),
    "P03": (f"{RASTER}::test_cut_and_damaged_pngs_are_refused_with_the_true_reason",),
    "P04": (f"{FILES}::test_p04_sixteen_bits_stay_sixteen_bits",),
    "P05": (
        f"{RASTER}::test_transparency_is_laid_on_black",
        f"{RASTER}::test_palettes_are_colours_for_images_and_numbers_for_labels",
        f"{RASTER}::test_one_bit_is_0_and_255_for_images_and_0_and_1_for_labels",
        f"{RASTER}::test_colour_models_of_print_are_converted_aloud",
        f"{RASTER}::test_exif_turns_a_picture_once",
        f"{RASTER}::test_the_content_decides_over_the_name",
        f"{RASTER}::test_an_animation_is_refused_even_with_pages",
    ),
    "P06": (f"{FILES}::test_p06_text_of_a_picture_goes_nowhere",),
    "P07": (
        f"{FILES}::test_p07_a_picture_has_no_size_in_mm_and_that_is_known",
        f"{FILES}::test_p07_pictures_have_no_scores_in_mm",
    ),
    "P08": (
        f"{FILES}::test_p08_a_picture_of_one_row_is_a_volume",
        "views/test_view_crops.py::test_a_volume_smaller_than_the_crop_is_filled_on_both_sides",
    ),
    "P09": (f"{FILES}::test_p09_one_picture_under_two_names_is_in_one_split",),
    # B.6 labels and tables
    "L01": (f"{LABELS}::test_l01_a_label_of_another_shape_is_refused_with_both_shapes",),
    "L02": (
        f"{LABELS}::test_l02_a_label_elsewhere_is_refused_or_trusted_on_demand",
        "data/test_reading.py::test_a_label_on_another_grid_is_refused_resampled_or_trusted",
    ),
    "L03": (f"{LABELS}::test_l03_a_label_is_a_whole_number_from_0_on",),
    "L04": (f"{LABELS}::test_l04_a_value_outside_the_declared_set_is_counted",),
    "L05": (
        f"{LABELS}::test_l05_an_empty_label_is_said",
        "evaluation/test_metrics.py::test_both_empty_is_full_agreement_and_marked",
        "evaluation/test_metrics.py::test_one_empty_takes_the_worst_value_of_every_metric",
    ),
    "L06": (f"{LABELS}::test_l06_large_numbers_do_not_wrap",),
    "L08": (f"{LABELS}::test_l08_a_label_that_was_cut_never_becomes_background",),
    "L09": (
        f"{LABELS}::test_l09_names_that_are_nearly_equal_are_refused_before_anything_is_written",
        f"{LABELS}::test_l09_a_missing_and_an_extra_label_are_booked",
        "evaluation/test_predict.py::test_names_that_would_be_written_to_one_file_are_refused_before_anything_is_written",
    ),
    "L10": (
        f"{LABELS}::test_l10_a_table_is_strict_and_names_the_line",
        f"{COHORT}::test_a_faulty_table_is_refused_with_the_line",
    ),
    "L12": (
        f"{LABELS}::test_l12_a_patient_in_two_splits_is_refused",
        f"{SCAN}::test_the_same_voxels_in_another_file_are_a_duplicate",
    ),
    # B.9 security of files
    "X04": (
        f"{SAFE}::test_x04_an_archive_writes_nowhere_else",
        f"{ARCHIVE}::test_a_member_that_leads_out_or_is_no_file_refuses_the_archive",
    ),
    "X05": (
        f"{ARCHIVE}::test_an_archive_that_grows_too_much_is_refused",
        f"{ARCHIVE}::test_a_header_of_gigabytes_is_not_believed",
    ),
    "X06": (
        f"{SAFE}::test_x06_links_out_of_the_folder_are_named",
        f"{SCAN}::test_a_link_out_of_the_folder_is_followed_only_if_told_so",
    ),
    "X07": (f"{SAFE}::test_x07_an_output_that_is_a_link_leaves_what_it_points_to",),
    "X08": (
        f"{SAFE}::test_x08_any_name_becomes_a_safe_id_of_one_case",
        f"{SCAN}::test_strange_names_get_safe_ids_or_are_refused",
    ),
    "X10": (
        f"{FILES}::test_x10_no_pickle_is_loaded",
        "io/test_npy.py::test_a_header_that_promises_too_much_takes_no_memory",
    ),
    "X14": (f"{SAFE}::test_x14_control_characters_reach_neither_table_nor_terminal",),
    "X15": (
        f"{SAFE}::test_x15_nothing_in_a_report_or_table_is_run",
        "report/test_cohort_page.py::test_everything_is_escaped",
    ),
    # B.10 privacy
    "H01": (
        f"{SCAN_DICOM}::test_no_planted_identifier_gets_into_anything_that_a_scan_or_a_preparation_writes",
        "faults/test_no_identifier_leaks.py::test_no_identifier_gets_into_anything_that_a_whole_run_writes",
    ),
    "H02": (f"{SCAN}::test_names_are_hashed_unless_told_otherwise",),
    "H03": (
        f"{FILES}::test_n25_n26_what_a_header_says_beside_the_grid_is_dropped",
        f"{FILES}::test_p06_text_of_a_picture_goes_nowhere",
        f"{ITK}::test_names_in_comments_are_never_copied",
    ),
    "H04": (f"{SCAN_DICOM}::test_text_in_the_picture_is_refused_or_accepted_without_a_thumbnail",),
    "H05": (f"{SAFE}::test_h05_a_name_in_the_wrong_place_is_shown_nowhere",),
    "H06": (f"{SAFE}::test_h06_neither_a_command_nor_its_decoder_leaves_a_core",),
    "H07": (f"{SAFE}::test_h07_a_face_is_said_only_where_the_header_says_head",),
    "H09": (f"{SAFE}::test_h09_no_picture_is_drawn_where_none_is_wanted_or_text_is_burned_in",),
    # C.4, D.1, D.2, D.4
    "C.4": (FUZZED, f"{ASSEMBLE}::test_random_sets_give_exact_volumes_or_named_errors"),
    "D.1": (
        f"{NIFTI}::test_a_result_has_the_geometry_bytes_of_its_source_and_nothing_else",
        "test_geometry.py::test_reoriented_there_and_back_is_the_identity",
        "test_volume.py::test_crop_equals_numpy_padding_and_goes_back",
    ),
    "D.2": (
        f"{MATRIX}::test_the_same_phantom_in_all_formats_has_the_same_world",
        f"{MATRIX}::test_the_whole_matrix",
        f"{MATRIX}::test_the_matrix_has_every_axis_order_and_5000_cases",
    ),
    "D.4": (
        f"{MATRIX}::test_each_of_40_planted_slips_is_seen",
        "evaluation/test_round_trip_geometry.py::test_a_label_comes_back_within_half_a_voxel_on_the_sources_own_grid",
        "test_volume.py::test_images_equal_simpleitk_in_world_space",
    ),
}

WAITING = {
    "N09": "no manifest of files yet: the data-quality part of the catalogue (E.2) brings it",
    "L07": "no names of structures reach a scan yet, and without them left cannot be told from right",
    "L11": "no classification yet; segmentation scores a missing structure by its stated rule (L05)",
}
PARTS = {
    "G01": "the validity mask of a regularised series is not stored; the warning counts what was filled",
    "D07": "no extra exists that could be installed; the refusal says to convert",
    "H04": "no screen for burned-in text itself; tag and modality decide",
    "H09": "pictures are on by default, since the scan's report is to show them; `thumbnails: false` turns them off",
    "L12": "there is no way to allow a leak",
    "N14": "there is no way to accept a spacing outside 0.01 to 50 mm",
    "N20": "every format that is written holds shear, so that E_SHEAR has no case",
    "X07": "a link in the place of an output is replaced, never followed, and so needs no refusal",
}
"""What a covered row asks for beyond what its tests show."""


def _names(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("row", ROWS)
def test_each_test_of_a_row_exists(row: str) -> None:
    from faulty_series import FAULTS

    assert ROWS[row]
    for test in ROWS[row]:
        name, _, case = test.partition("[")
        file, _, function = name.partition("::")
        assert function in _names(TESTS / file), test
        assert not case or case.rstrip("]") in FAULTS, test


def test_every_row_is_covered_or_waits_with_a_reason() -> None:
    counts = {"N": 29, "M": 13, "D": 30, "G": 23, "P": 9, "L": 12}
    rows = {f"{letter}{n:02d}" for letter, count in counts.items() for n in range(1, count + 1)}
    rows |= {"X04", "X05", "X06", "X07", "X08", "X10", "X14", "X15", *(f"H0{n}" for n in (1, 2, 3, 4, 5, 6, 7, 9))}
    assert rows == {row for row in ROWS if "." not in row} | set(WAITING)
    assert not set(ROWS) & set(WAITING)
    assert set(PARTS) <= set(ROWS)
