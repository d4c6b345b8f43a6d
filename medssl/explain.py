"""What every code that medssl prints means, and what to do about it; the longer answer behind a one-line message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

NOTHING = "Nothing to do."
"""The remedy of a warning that asks for none."""

# One entry: code, what it means, "->", what to do. A line that begins with "#" opens a section.
_TABLE = """
# Files

E_MISSING  There is no such file. -> Correct the path, or the link that leads there.
E_NOT_REGULAR  The path is a device, a pipe or another thing that is no regular file. -> Give the name of an image file.
E_EMPTY  The file has no bytes, as after a copy that was cut short. -> Copy it again from its source.
E_PERMISSION  This account may not read or write there. -> Ask the owner for permission, or choose another place.
E_READ  The system could not read the file or folder. -> Check path, permission and disk, then run again.
E_FORMAT  The content is of no kind that medssl reads or writes, whatever the name says.
    -> Export or convert to DICOM, NIfTI, MHA, NRRD, PNG or TIFF.
E_NOT_IMAGE  A DICOM file without pixels of an image: a directory, report, plan, document or presentation state.
    -> Nothing to do, if the images themselves are beside it; else export the image series.
E_TRUNCATED  The file ends before the voxels that its header promises; the rest was never copied.
    -> Copy it again from its source and compare the sizes. Never fill it up.
E_TRAILING  There are more bytes than the header accounts for, so header and content are not of one piece.
    -> Take the file from its source again.
E_CRC  The checksum inside the file does not fit its content: bits have changed on disk or on the way.
    -> Copy it again from its source.
E_HEADER  A header field holds a value that the format does not allow. -> Export the image again from its source.
E_SIZE_LIE  The header asks for far more voxels than the file can hold. -> Do not trust this file; take the source.
E_BOMB  A small file would unpack to an absurd size. -> Do not trust it; if it is a real large image, cut it up first.
E_PATH  The header names a voxel file in another folder, which medssl does not follow.
    -> Put both files into one folder and name the voxel file without a path.
E_PAIR  One file of a pair is missing, or it cannot be told which label map belongs to which image.
    -> Put both files side by side, name label maps like their image, or list the pairs in a CSV.
    If the image itself was refused, mend that first.
E_ENCODING  The voxels are stored in a way that is not read. -> Convert to .mha, .nrrd or .nii.gz with SimpleITK.
E_DTYPE  The voxel type is none that can be kept without loss. -> Convert to float32 or to integers of at most 32 bits.
E_NDIM  The image has more dimensions than one volume has.
    -> Choose one with `--volume k`, or in a scan with `--volumes first`; or take them as channels.
E_RANGE  Values do not fit the type that would hold them. -> Rescale the image, or renumber the labels.
E_NONFINITE  There are too many voxels that are NaN or infinite, or any in a label map. -> Repair the image or label.
E_LINK  A link leads out of the folder, or to a folder. -> Give the real folder, or set `--set follow_links=true`.
E_NAME  A file name cannot be written into tables or on this disk. -> Rename the file: letters, digits and . _ - only.
E_NAME_CLASH  Two names are the same but for upper case, accents, blanks or the file type. -> Rename one of them.
E_ARCHIVE  The archive is damaged, protected, or holds members that would leave its folder.
    -> Unpack it by hand into a folder of its own and scan that.
E_READER_CRASH  The process that read this file died, most often because of damaged content; the others went on.
    -> Take the file from its source again; if it persists, leave the file out and report it.
E_READER_LIMIT  Decoding took more memory or time than an image of this size can need.
    -> Take the file from its source again; damaged content can do this.
E_HUNG  One file took far longer than the others and was given up. -> Check the disk; try this file alone.
E_MEMORY  There is not enough free memory. -> Free memory, use fewer workers, or work on smaller images.
E_UNEXPECTED  A fault that medssl did not foresee; only this file is affected.
    -> Please report it, with what `--debug` shows.
E_NO_DATA  The place given is neither a folder nor a table of cases. -> Give a folder of images, or a CSV of cases.
E_NO_INPUT  Nothing usable was found. -> Check the path and read refused.csv, which says why each file was left out.

# DICOM files

E_PIXEL_LENGTH  There are more or fewer bytes of pixels than rows, columns, frames and bits ask for.
    -> Export the file again; a cut slice must not be filled up.
E_CHANGED  The file changed while it was read. -> Wait until it is copied, then run again.
E_CODEC  The pixels are compressed in a way for which there is no decoder here.
    -> Export uncompressed or as JPEG 2000, or convert with `dcmdjpeg` or `gdcmconv --raw`.
E_CODEC_DATA  The compressed pixels do not decode to a picture of the stated size. -> Export the file again.
E_TAG  A DICOM element that is needed holds a text that is no number, or is missing. -> Export the series again.
E_RESCALE  The rescale slope is zero or no number, so stored values cannot become real ones. -> Export again.
E_SIGNEDNESS  Stored values are signed, and the header calls them unsigned (or the reverse).
    -> If the histogram agrees, read with `--set fix_signedness=true`.
E_PHOTOMETRIC  The colour model is unknown or does not fit the pixels. -> Export as RGB or MONOCHROME2.
E_BURNED_IN  The file says that text, often the patient's name, is written into the picture.
    -> Clean the pictures, or scan with `--set burned_in=accept` if you may use them so.
E_UNIT  The values are not in the unit that was asked for, such as HU or SUV. -> Correct the modality, or ask for none.
W_NO_META  The file lacks the usual DICOM head and was read all the same, as implicit or explicit little endian.
    -> Nothing to do, if geometry and values look right.
W_PREAMBLE  The first bytes of the DICOM file are those of a program. -> Treat the file with suspicion; it is never run.
W_UID  An identifier is not of the form that DICOM prescribes; it is used for comparison only. -> Nothing to do.
W_DS_LENGTH  A number is written with more characters than DICOM allows; it was read in full. -> Nothing to do.
W_NO_RESCALE  A CT without rescale slope and intercept: its values are not known to be HU.
    -> Export again with rescale, or prepare it as arbitrary units.
W_MONOCHROME1  White and black were swapped, so that bright means dense as in MONOCHROME2. -> Nothing to do.
W_PADDING  Voxels that the scanner marked as outside its field of view were filled. -> Nothing to do.
W_MODALITY_LUT  The file maps its values by a table, which is not applied; the stored values are kept.
    -> Export the images with a rescale slope, if the unit matters.
W_CODESTREAM  The compressed pixels have another sign or depth than the header says; the pixels were believed.
    -> Check the value range.
W_GREY  A colour picture whose colours are all grey was read as grey. -> Nothing to do.
W_SIGNEDNESS  Values labelled unsigned were taken as signed, as asked. -> Check the value range.
W_NO_SUV  A PET series lacks what SUV needs, or has it in another unit; stored activity is given.
    -> Export with weight, dose, half-life and times if you need SUV.
W_IMAGER_SPACING  The pixel spacing is that at the detector; the object is smaller by an unknown magnification.
    -> Do not measure in mm unless that is good enough.
W_US_SPACING  The pixel spacing was taken from the calibrated region of the ultrasound picture. -> Nothing to do.
W_BURNED_IN  Pictures of this kind often carry text, and the file does not say that there is none.
    -> Look at the thumbnails before you share anything.
W_FACE  A head scan, from which a face can be rendered. -> Deface it before you share it.
W_SC  A screen save or another derived picture lay in the series and was left out. -> Nothing to do.

# DICOM series

E_MISSING_SLICE  One or more slices of the series are not there, so two neighbours lie too far apart.
    -> Export the missing slices. Where few are missing, `--regularise` interpolates them and says so.
E_NONUNIFORM  The distances between slices vary. -> Export one volume at a time, or resample with `--regularise`.
E_DUP_POSITION  Two slices with different content lie at one place, and no header field tells two volumes apart.
    -> Export one reconstruction only.
E_DUP_SOP  Two different files claim to be the same DICOM instance. -> Find out which is right and remove the other.
E_MIXED_SPACING  Slices of one series have different pixel sizes. -> Export again, or separate them by hand.
E_MIXED_SHAPE  Slices of one series have different numbers of rows or columns. -> Separate them by hand.
E_IOP  The direction vectors are no right-angled unit vectors. -> Export again; guessing them would move the image.
E_NO_GEOMETRY  Slices have neither position nor orientation, so they cannot be stacked.
    -> Export the original series, not derived pictures.
E_AMBIGUOUS_STACK  Several slices share each place, and no header field sorts them into volumes.
    -> Export echoes, phases or b-values as series of their own.
E_PATIENT_MIX  One series holds slices of two patients. -> Separate them at the source; something went badly wrong.
E_SEVERAL  The item holds several volumes, and none was chosen. -> Choose with `--volume k`, or take all.
E_VOLUME  The item has no volume of that number. -> Choose one of those that the message names, from 0.
E_SERIES_LIST  The series list is damaged, or of another version of medssl. -> Scan the files again.
E_SERIES_CHANGED  The files no longer make the volumes that the scan has seen. -> Scan the files again.
E_NEEDS_IMAGE  Contours and segmentations lie on the grid of an image. -> Give that image with `--on`.
E_NO_REGION  There is no closed contour that could be filled. -> Give a structure set with drawn regions.
W_TILT  The gantry was tilted: slices are shifted against each other. The shear is kept in the affine.
    -> Nothing to do; preparing resamples it to right angles.
W_SPACING_TAG  Thickness or spacing as stated differ from the positions of the slices; positions were believed.
    -> Nothing to do.
W_SINGLE_SLICE  A series of one slice; its thickness is that of the header, or 1 mm. -> Use it as a 2D image.
W_REGULARISED  Slices were interpolated onto even distances, as asked. -> Leave these cases out of an evaluation.
W_VOLUMES  Of many volumes in one item, only some were taken. -> Scan with `--volumes all` to take each.
W_FRACTIONAL  A segmentation of probabilities was cut at one half. -> Check borders if they matter.
W_CONTOUR_OFF  A contour does not lie on a slice of the image and went to the nearest one, or was left out.
    -> Check the structure set against this series.
W_CONTOUR_CUT  Contours reach beyond the edge of the image and were cut there. -> Check that they belong to this series.
W_CONTOUR_GAP  A structure has no contour on some slices between its ends; they stay empty. -> Look at those slices.
W_CONTOUR_KIND  Points, lines and contours that enclose nothing were left out. -> Nothing to do.
W_ROI_NUMBER  The numbers of the regions cannot be label values; they were numbered anew from 1, in their order.
    -> Note which number is which structure.
W_OVERLAP  Structures overlap, so each became a channel of 0 and 1. -> Nothing to do, or choose which structure wins.
W_SPLIT  One series holds images on several grids; each became an image of its own. -> Nothing to do.
W_BROKEN_NEIGHBOUR  Files of the same folder could not be read; slices at the ends of this image may be among them.
    -> Mend or copy those files again, and compare the number of slices with the source.
W_LEFT_OUT  Files of the folder are not part of the volume. -> Nothing to do, if the number of slices is right.
W_LOCALIZER  A lone slice of another direction or size, such as a planning view, was left out. -> Nothing to do.
W_FRAME_POSITIONS  One position is given for all frames of a file; even steps were assumed.
    -> Compare the distance of slices with the source.
W_VOLUME_ORDER  Only instance numbers tell the volumes of this series apart. -> Check one of them against a viewer.
W_MIXED_TRAITS  Slices of one volume differ in fields that usually tell volumes apart. -> Look at the thumbnail.

# Grids

E_AFFINE  The matrix from voxels to millimetres is not finite or flattens space. -> Repair the header, or export again.
E_SHAPE  Sizes do not fit: image and label, or array and grid.
    -> Use a label map that was drawn on this very image, or scan with `--label-grid resample`.
E_GEOMETRY  Two grids lie at different places or turn differently by more than 0.1 mm.
    -> Scan with `--label-grid resample` for labels on another grid; with `trust` if only the label's header is wrong.
E_SPACING  A voxel size is zero, no number, or outside 0.01 to 50 mm.
    -> Export again; if the true size is known, give it with `--assume-spacing`.
E_NO_SPACING  The file does not say how large a voxel is. -> Give it with `--assume-spacing X Y Z`.
E_ORIENTATION  The orientation is not one letter each of R/L, A/P and S/I. -> Write RAS, LPS or the like.
E_XFORM_CONFLICT  The two transforms of a NIfTI file place the image differently.
    -> Find out which is right, then read with `--xform sform` or `--xform qform`.
E_SPACE  The NRRD world is none of the patient's. -> Convert it to left-posterior-superior.
E_SPACE_DIRS  The NRRD directions do not span three axes of space. -> Take the source and convert again.
E_UNITS  Positions are not in mm. -> Convert them to mm.
W_NO_XFORM  The file states no orientation; left and right, front and back, head and foot are a guess.
    -> Compare with the source before you trust any side.
W_NO_SPACE  The NRRD file names no anatomical space; left-posterior-superior was assumed. -> Check left and right.
W_NO_SPACING  The file has no size in mm; 1 mm was assumed. -> Give `--assume-spacing` before you measure anything.
W_SPACING_MISSING  The file has no voxel size; 1 mm was assumed. -> Give `--assume-spacing` if you know better.
W_SPACING_ASSUMED  The voxel size that you gave was used. -> Nothing to do.
W_PIXDIM  A negative voxel size was taken as positive. -> Nothing to do; the transform decides the direction.
W_UNITS  Positions in metres or micrometres were converted to mm. -> Nothing to do, if the size in mm looks right.
W_ORIGIN  The grid lies very far from the origin, where single precision gets coarse. -> Move the origin if it matters.
W_SHEAR  The axes are not at right angles; the image was resampled. -> Nothing to do.

# Values, pictures and labels

E_LABEL_VALUE  Label values are no whole numbers from 0 on. -> Save the label map without interpolation or loss.
E_LABEL_SET  There are label values that the study does not know. -> Correct the label map, or the list of values.
E_EMPTY_MASK  A measure needs a structure, and there is none. -> Leave it out, or say how to score absence.
W_SCALING  An impossible scale factor was ignored; stored values are used. -> Check the value range.
W_NONFINITE  A few voxels that were NaN or infinite were filled. -> Nothing to do, if they are outside the body.
W_NOT_HU  A CT whose values do not look like HU. -> Check rescale and modality.
W_CLIPPED  Many voxels are far brighter than the rest and become one value.
    -> Tell the body from a dark ground with body_mask, raise intensity.clip, or take intensity mode none.
W_CONSTANT  Every voxel has the same value. -> Leave the image out; there is nothing to learn from it.
W_EMPTY_LABEL  The label map is background only. -> Nothing to do, if the structure is really absent.
W_LABEL_LOST  A structure is smaller than a voxel of the prepared grid and vanished. -> Prepare at a finer spacing.
W_LABEL_RESAMPLED  The label map was brought to the image's grid, as asked. -> Nothing to do.
W_LABEL_TRUSTED  The label map's own header was ignored, as asked. -> Look at an overlay of this case.
W_CROP_LABEL  The crop to the body would have cut labelled voxels. -> Nothing to do; it was widened or left out.
W_NO_BACKGROUND  No dark background was found, so the whole volume counts as body. -> Nothing to do.
W_NO_BODY  No voxel is brighter than the background. -> Check modality and values.
W_ALPHA  Transparent pixels were laid on black. -> Nothing to do.
W_COLOUR  Colours were converted to RGB. -> Nothing to do.
W_EXIF  The picture was turned as its camera says. -> Nothing to do.
W_PAGES  The pages of the file were stacked as slices, as asked. -> Give `--assume-spacing` if the distance is known.
W_EXTENSION  The name promises another format than the content has; the content decides. -> Rename the file.
W_TRAILING  Zero bytes after the image were ignored. -> Nothing to do.

# Cohorts and tables

E_CASE  A case breaks a rule of the cohort. -> See the message; correct or drop the case.
E_TABLE  A line of a CSV cannot be understood. -> Correct the line; save as UTF-8 with commas, ids as text.
E_NO_TABLE  The table that was named is not there. -> Give its path.
E_DUPLICATE_ID  A case id occurs twice. -> Rename one.
E_KEY  The file of pseudonyms holds no key. -> Give the pseudonyms.json of an earlier scan, or move it away.
E_LEAK  A person is in more than one split, or an image or its copy in two sets, so the test would be no test.
    -> Correct the split column; leave the copies out of one of the sets.
E_NO_CASE  There is no case of this id among those embedded. -> Take an id of the store's index.csv.
E_SAME_SET  A set would be compared with itself. -> Give two sets, or two splits of one.
E_KINDS  The two sets cannot be compared: embeddings of one bundle belong together, images with images.
    -> Embed both with the same bundle and options, or give two stores or two cohorts.
E_TARGET  A column to learn is not there, or says what cannot be learned.
    -> Name a column that was kept at the scan, correct its values, or split anew.
E_MODALITY  The images are of another modality than the preparation or the augmentation is for, or it is not known.
    -> Take the recipe of that modality, with a store of its own; set modality in the preparation.
E_SPATIAL_DIMS  A volume, where the preparation or an augmentation is for images of one slice, or the reverse.
    -> Nothing, if these cases belong to another study; else prepare them into a store of their own. Leave the
    augmentation out.
E_NO_LABEL  There is no label map where one is needed. -> Add it, or leave the case out.
E_MULTI_LABEL  Structures overlap, each in a channel of its own, where one number a voxel is needed.
    -> Choose which structure wins and write one label map.
E_NO_PREDICTION  A case has no predicted label map; it gets the worst score. -> Predict it.
E_OVERWRITE  The output would take the place of an input. -> Choose another output folder.
W_DUPLICATE  The same image was found twice; one was kept. -> Nothing to do.
W_SUBJECT  It is a guess whose image this is; one person could be in two splits.
    -> Give a table with subject_id (`--table`).
W_ONE_SUBJECT  All images count as one person's, so no split can be made. -> Give a table with subject_id.
W_NO_SPLIT  The case has no split while others have. -> Complete the table.
W_NOT_IN_TABLE  The table has no row for this case. -> Add one, or accept the guess.
W_NO_LABEL  A label map was expected here and is missing. -> Add it if the case should be labelled.
W_LABEL_SET  Predicted and reference labels have different values. -> Check the numbering.
W_NO_MM  There is no voxel size, so distances in mm are not given. -> Use files with a spacing.

# Stores, recipes and training

E_CONFIG  A recipe or an option is wrong. -> See the message; `--help` lists the options.
E_UNKNOWN_NAME  There is no method, network or augmentation of that name. -> Take one that the message lists.
E_NO_STORE  The folder is no finished store. -> Give the folder that `medssl prepare` wrote.
E_VERSION  The file comes from another version of medssl. -> Use that version, or make it anew.
E_DIGEST  A file has changed since it was written. -> Restore it, or make it anew from its source.
E_SAMPLE  A case could not be read while training. -> Check the store; prepare it again.
E_WORKER  A process that loads data ended. -> Free memory or use fewer workers; then run the same command again.
E_CONTRACT  Image and network do not fit in channels, spacing or unit. -> Prepare as the bundle's passport says.
E_PICKLE  A checkpoint can only be read by running code that is in it, which medssl never does.
    -> Save the state_dict alone with the software that it comes from, as safetensors or with torch.save.
E_WEIGHTS  Weights do not fit the network. -> Take the bundle that belongs to this recipe.
E_MIRROR  A mirror where left and right, front and back or head and foot are different, or where nobody said what the
    images show. -> Leave the mirror out, or set region in the preparation.
E_POSITION_AUGMENT  An augmentation would move what this method compares by place. -> Leave it out.
E_DOMAIN  An augmentation does not make sense for what values mean at its place, such as gamma on signed HU.
    -> Put it behind a window or a rescaling, or leave it out.
E_REGION  An augmentation preset is for another part of the body than the images show.
    -> Take the preset of that part, or correct region in the preparation.
E_CHANNELS  The images, or some of them, have another number of channels than is needed.
    -> Leave out augments of colours for grey images; prepare with channels: 1 or 3 where both are mixed.
E_PRESET_CONFLICT  Two augmentation presets are for different images, or would do the same thing twice.
    -> Take one of them; leave single augmentations out with without.
E_FOLD  A fold of a cross-validation would have no subject, or none with one of the structures.
    -> Take fewer folds, another seed, or leave the structure out of the labels.
E_CROP  Most of each crop would lie outside the volumes. -> Make crop_voxels or crop_mm smaller.
E_GROUP  An augmentation mixes images in groups, and the batch is not made of whole groups.
    -> Make train.batch_size a multiple of group.
E_MIXED_LABELS  An augmentation mixes images and has no rule for their label maps. -> Leave it out, or take cutmix.
E_SPACING_UNKNOWN  A size in mm is asked for, and the voxel size of a case is not known.
    -> Give the size in voxels, or prepare the case with assume_spacing_mm.
E_ATLAS  The atlas.json of a store is not sound. -> Write it anew, or remove it to train without an atlas.
E_NO_ATLAS  Atlas coordinates are asked for, and the case is not registered to an atlas. -> Take body coordinates.
E_NO_OVERLAP  A crop overlaps none of those that it is compared with. -> Use larger crops or volumes.
E_STATISTICS  Too few values for this statistic. -> Add subjects or seeds.
E_ONE_CLASS  At least two classes or values are needed, and there is one. -> Add cases of another.
E_COLLAPSE  The encoder gives the same answer for everything.
    -> Lower the learning rate, or change the method's options.
E_TRAINING  Training gave values that cannot be trusted. -> Resume from the last good checkpoint; lower the rate.
E_NONFINITE_LOSS  The loss was no number several times in a row. -> Lower the learning rate; check the inputs.
E_NONFINITE_WEIGHTS  Weights are no numbers; nothing was saved. -> Resume from the last good checkpoint.
E_RESUME_DIFF  The recipe differs from that of the run to go on with. -> Use the same recipe, or another folder.
E_RESUME_EXISTS  The folder already holds a run. -> Resume it, or choose another folder.
E_RESUME_NOTHING  There is nothing to go on with. -> Start with `--resume auto`.
E_STOPPED  A signal ended the run. -> Run the same command again; it goes on where it stood.

# Machine

E_ENVIRONMENT  Disk, memory, device or permission stands in the way. -> Mend it and run the same command again.
E_DISK_FULL  No space is left. -> Free space and run the same command again.
E_DISK  The disk or its connection failed. -> Mend it and run the same command again.
E_NOT_A_FOLDER  A file lies where a folder is needed. -> Choose another output name.
E_DEVICE  The device that was asked for is not there. -> Choose `--device auto` or `cpu`.
E_OUT_OF_MEMORY  The device has too little memory. -> Use smaller crops or batches.
E_LOCKED  Another run holds the folder. -> Wait for it, stop it, or choose another folder.
E_MEDSSL  A refusal without a name of its own. -> See the message.
"""

_WARNING = re.compile(r"(?<!\S)(W_[A-Z0-9_]+): ")
_ENTRY = re.compile(r"([EW]_[A-Z0-9_]+)  (.+?) -> (.+)")


@dataclass(frozen=True)
class Explanation:
    """One code in words.

    Args:
        code: ``E_...`` is a refusal, ``W_...`` a warning.
        section: What it is about.
        meaning: What was found.
        remedy: What to do.
    """

    code: str
    section: str
    meaning: str
    remedy: str


def explain(code: str) -> Explanation | None:
    """All that is known of a code; None for one that medssl does not use."""
    return _explanations().get(code)


def meaning(code: str) -> str:
    """What a code means, in a sentence or two; empty for an unknown one."""
    found = explain(code)
    return found.meaning if found else ""


def remedy(code: str) -> str:
    """What to do about a code, in a sentence or two; empty for an unknown one."""
    found = explain(code)
    return found.remedy if found else ""


def codes(text: str) -> list[str]:
    """Codes of the warnings in a text of ``W_CODE: sentence`` strings, in their order."""
    return _WARNING.findall(text)


def markdown() -> str:
    """The page docs/codes.md."""
    lines = [
        "# Codes",
        "",
        "Every refusal (`E_`) and warning (`W_`) of medssl; `medssl doctor FILE` says more of one file. "
        "This page is made from `medssl/explain.py`.",
    ]
    section = ""
    for entry in _explanations().values():
        if entry.section != section:
            section = entry.section
            lines += ["", f"## {section}", "", "| code | what it means | what to do |", "|---|---|---|"]
        lines.append(f"| `{entry.code}` | {entry.meaning} | {entry.remedy} |")
    return "\n".join(lines) + "\n"


@cache
def _explanations() -> dict[str, Explanation]:
    entries: dict[str, Explanation] = {}
    section = ""
    for paragraph in re.split(r"\n(?=\S)", _TABLE.strip()):
        text = " ".join(line.strip() for line in paragraph.strip().splitlines())
        if text.startswith("#"):
            section = text.removeprefix("# ")
        elif found := _ENTRY.fullmatch(text):
            entries[found[1]] = Explanation(found[1], section, found[2], found[3])
    return entries
